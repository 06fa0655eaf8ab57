"""Recommending micro-videos with what frozen large video-language models know, on Ray."""

import os

# What Ray shows of its processes' output, before anything imports ray: all but the notes of its own C++ code, which its
# log files keep; a crash stays. A line that several processes say is shown of each, not folded into one.
RAYS_NOTE = r"\[[\d :,.-]+ [IWE] \d+ \d+\] (\(\w+\) )?\w+\.cc:\d+: "
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", f"^{RAYS_NOTE}")
os.environ.setdefault("RAY_DEDUP_LOGS_ALLOW_REGEX", f"^(?!{RAYS_NOTE})")
