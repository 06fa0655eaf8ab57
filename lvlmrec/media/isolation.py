"""Decoding in a child process, so that a file that hangs or crashes the decoder affects no other file.

The child is this module run as a program, not a multiprocessing worker: Ray workers start it, whose `__main__` is not
this project's. It imports only PyAV, Pillow and numpy, and decodes one video after the other.

Each message is an 8-byte length and JSON; pictures and motion follow their JSON as raw bytes. Nothing is unpickled
from a process that has parsed a hostile file.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO, TypeVar

import av.logging
import av.sidedata.motionvectors  # PyAV would import both later, and fail under a small memory limit
import av.subtitles.stream
import numpy as np

from lvlmrec.errors import one_line
from lvlmrec.media.file import VideoError
from lvlmrec.media.motion import CLIP_FRAMES, KEYFRAME_SIZE, MAP_SIZE, MotionClips, motion_clips
from lvlmrec.media.sampling import Clip, sample_clip

T = TypeVar("T", Clip, MotionClips)
DEFAULT_MEMORY_MB = 4096
START_SECONDS = 60.0  # importing numpy is slow on a busy machine; a video's time limit begins after that
STDERR_BYTES = 64 * 1024
STREAM_BYTES = 4 * 2**30  # an hour at the bit rate of `motion.encode`
LENGTH = struct.Struct("<Q")
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class NoDecoderError(RuntimeError):
    """The child cannot be started, because of the installation or the machine, not of a file."""


class IsolatedDecoder:
    """`sample_clip` and `motion_clips` in a child process with limits. Not for use by several threads at once.

    A child is started for the first video, and for the next one after a video that killed it. It dies with the thread
    that started it (prctl(2), PR_SET_PDEATHSIG); the next video then starts another.

    memory_mb  limit of the child's address space, RLIMIT_AS, in MB
    """

    program = __name__  # module that the child runs; the fuzzer replaces it

    def __init__(self, memory_mb: int = DEFAULT_MEMORY_MB) -> None:
        self.memory_mb = memory_mb
        self._child: subprocess.Popen[bytes] | None = None
        self._stderr: BinaryIO | IO[bytes] | None = None

    def __enter__(self) -> IsolatedDecoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """PID of the child, None while there is none."""
        return self._child.pid if self._child else None

    def sample_clip(self, path: str | Path, num_frames: int, max_side: int, timeout_s: float) -> Clip:
        """`sampling.sample_clip` within `timeout_s` seconds of wall time.

        Raises `VideoError`, also with error `timeout`, `decoder_died` or `out_of_memory`, and `NoDecoderError`.
        """
        request = {"path": os.fspath(path), "num_frames": num_frames, "max_side": max_side}
        return self._request(request, self._receive_clip, timeout_s)

    def motion_clips(self, path: str | Path, max_clips: int, timeout_s: float) -> MotionClips:
        """`motion.motion_clips` within `timeout_s` seconds of wall time. Raises as `sample_clip`."""
        return self._request({"path": os.fspath(path), "max_clips": max_clips}, self._receive_motion, timeout_s)

    def _request(self, request: dict[str, Any], receive: Callable[[dict[str, Any], float], T], timeout_s: float) -> T:
        """Send a request; `receive(header, deadline)` reads what follows the answer's header and is returned."""
        if self._child is None or self._child.poll() is not None:
            self._start()
        is_reusable = False
        try:
            deadline = time.monotonic() + timeout_s
            self._send(request)
            answer = self._receive_json(deadline)
            received = receive(answer, deadline) if "error" not in answer else None
            is_reusable = answer.get("stage") in (None, "open", "probe")  # a failed decoder may leak memory
        except TimeoutError:
            message = f"no clip within {timeout_s:g} s; the decoder was killed"
            raise VideoError("decode", "timeout", message) from None
        except (EOFError, BrokenPipeError):
            raise VideoError("decode", "decoder_died", self._describe_exit()) from None
        finally:
            if not is_reusable:  # the rest of this answer must not be read as the next one
                self.close()
        if received is None:
            raise VideoError(answer["stage"], answer["error"], answer["message"])
        return received

    def close(self) -> None:
        """End the child. The next video starts another."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                if pipe is not None:
                    pipe.close()
        if self._stderr is not None:
            self._stderr.close()
        self._child = self._stderr = None

    def _start(self) -> None:
        self.close()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (close() closes it)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(
                p for p in sys.path if p
            ),  # the child imports from the same places, in the same order
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", self.program, str(self.memory_mb), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
            env=environment,
            start_new_session=True,  # Ctrl-C in the terminal reaches the parent alone
        )
        try:
            self._receive_json(time.monotonic() + START_SECONDS)
        except (TimeoutError, EOFError) as error:
            message = f"the decoder process did not start: {type(error).__name__}; {self._describe_exit()}"
            self.close()
            raise NoDecoderError(message) from error

    def _send(self, request: dict[str, Any]) -> None:
        assert self._child is not None and self._child.stdin is not None
        _write_json(self._child.stdin.fileno(), request)

    def _receive_json(self, deadline: float) -> dict[str, Any]:
        (length,) = LENGTH.unpack(self._receive(LENGTH.size, deadline))
        answer: dict[str, Any] = json.loads(self._receive(length, deadline))
        return answer

    def _receive_clip(self, header: dict[str, Any], deadline: float) -> Clip:
        pixels = self._receive(int(np.prod(header["shape"])), deadline)
        return Clip(
            frames=np.frombuffer(pixels, np.uint8).reshape(header["shape"]),
            timestamps=np.array(header["timestamps"], np.float64),
            frame_indices=np.array(header["frame_indices"], np.int64),
            num_source_frames=header["num_source_frames"],
            duration=header["duration"],
        )

    def _receive_motion(self, header: dict[str, Any], deadline: float) -> MotionClips:
        starts = np.array(header["starts"], np.int64)
        keyframes = np.frombuffer(self._receive(len(starts) * KEYFRAME_SIZE**2 * 3, deadline), np.uint8)
        motion_shape = (len(starts), 2, CLIP_FRAMES, *MAP_SIZE)
        motion = np.frombuffer(self._receive(math.prod(motion_shape) * 4, deadline), np.float32)
        return MotionClips(
            keyframes=keyframes.reshape(len(starts), KEYFRAME_SIZE, KEYFRAME_SIZE, 3),
            motion=motion.reshape(motion_shape),
            starts=starts,
            num_frames=header["num_frames"],
        )

    def _receive(self, num_bytes: int, deadline: float) -> bytearray:
        """Read `num_bytes`. Raises `TimeoutError` at the deadline and `EOFError` when the child has ended."""
        assert self._child is not None and self._child.stdout is not None
        pipe = self._child.stdout.fileno()
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        received = bytearray(num_bytes)
        num_received = 0
        while num_received < num_bytes:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            count = os.readv(pipe, [memoryview(received)[num_received:]])
            if count == 0:
                raise EOFError
            num_received += count
        return received

    def _describe_exit(self) -> str:
        """The child's exit status and the end of its stderr, in one line."""
        assert self._child is not None and self._stderr is not None
        try:
            code = self._child.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "the decoder process closed its pipe"
        exit_status = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        size = os.fstat(self._stderr.fileno()).st_size
        output = os.pread(self._stderr.fileno(), 300, max(0, size - 300)).decode(errors="replace").strip()
        return f"the decoder process ended: {exit_status}" + (f"; it said: {output.splitlines()[-1]}" if output else "")


def _write_json(descriptor: int, tree: dict[str, Any]) -> None:
    text = json.dumps(tree).encode()
    _write(descriptor, LENGTH.pack(len(text)) + text)


def _write(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _set_limits(memory_mb: int, parent: int) -> None:
    """Limit this process: it dies with the parent, and memory, file size, core dumps and FFmpeg's log are bounded."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the line above
        os._exit(0)
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_FSIZE, (STDERR_BYTES, STREAM_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    av.logging.set_level(None)  # else FFmpeg's log is unbounded


def _serve(request: dict[str, Any], output_fd: int) -> None:
    try:
        header, arrays = _read_motion(request) if "max_clips" in request else _read_clip(request)
    except VideoError as error:
        message = error.message + _memory_hint()
        _write_json(output_fd, {"stage": error.stage, "error": error.error, "message": message})
        return
    except MemoryError:
        _write_json(output_fd, {"stage": "decode", "error": "out_of_memory", "message": "MemoryError outside FFmpeg"})
        return
    except Exception as error:
        message = f"{type(error).__name__}: {one_line(error)}"
        _write_json(output_fd, {"stage": "decode", "error": "decode_failed", "message": message})
        return
    _write_json(output_fd, header)
    for array in arrays:
        _write(output_fd, np.ascontiguousarray(array).data.cast("B"))


def _read_clip(request: dict[str, Any]) -> tuple[dict[str, Any], list[np.ndarray]]:
    clip = sample_clip(request["path"], request["num_frames"], request["max_side"])
    header = {
        "shape": clip.frames.shape,
        "timestamps": clip.timestamps.tolist(),
        "frame_indices": clip.frame_indices.tolist(),
        "num_source_frames": clip.num_source_frames,
        "duration": clip.duration,
    }
    return header, [clip.frames]


def _read_motion(request: dict[str, Any]) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Motion clips as header and arrays. Here the child may write larger files: the encoded stream of a long video."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (STREAM_BYTES, STREAM_BYTES))
    try:
        clips = motion_clips(request["path"], request["max_clips"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (STDERR_BYTES, STREAM_BYTES))
    return {"starts": clips.starts.tolist(), "num_frames": clips.num_frames}, [clips.keyframes, clips.motion]


def _memory_hint() -> str:
    """A remark when memory came close to the limit: some decoders report a failed allocation as invalid data."""
    limit_mb = resource.getrlimit(resource.RLIMIT_AS)[0] >> 20
    status = Path("/proc/self/status").read_text()
    peak_mb = int(status.partition("VmPeak:")[2].split()[0]) >> 10
    return f" (memory peaked at {peak_mb} of {limit_mb} MB)" if peak_mb > limit_mb * 0.75 else ""


def main(arguments: list[str]) -> None:
    """The child's program: answers requests from stdin until that ends. Arguments: memory in MB, the parent's PID."""
    output_fd = os.dup(1)
    os.dup2(2, 1)  # libraries that print to stdout must not corrupt the answers
    _set_limits(int(arguments[0]), int(arguments[1]))
    _write_json(output_fd, {"ready": True})
    requests = sys.stdin.buffer
    while prefix := requests.read(LENGTH.size):
        _serve(json.loads(requests.read(*LENGTH.unpack(prefix))), output_fd)


if __name__ == "__main__":
    main(sys.argv[1:])
