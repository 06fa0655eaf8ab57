"""Recommending micro-videos with what frozen large video-language models know, on Ray."""
