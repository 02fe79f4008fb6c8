"""ffmpeg filters that put video and audio on one clock, see `preprocessing.media.decoder`."""

import subprocess
from fractions import Fraction
from functools import cache

from preprocessing.media.probe import MediaError, VideoInfo

HDR_TRANSFERS = ("smpte2084", "arib-std-b67")  # PQ and HLG
HDR_WHITE = 203  # nits of SDR white: diffuse white of ITU-R BT.2408 (signal 0.75 in HLG)
TONE_KNEE = 0.8  # share of SDR white above which luminance is compressed
# Timestamps in milliseconds (Matroska, FLV) jitter by one. Audio with a larger drift is stretched within a second;
# audio with a larger error than the gap is padded or cut.
JITTER_SECONDS, GAP_SECONDS = 0.001, 0.005
CUT_SCORE = "lavfi.scd.score"


@cache
def has_filter(name: str) -> bool:
    """Return True if the installed ffmpeg has a filter."""
    listed = subprocess.run(["ffmpeg", "-hide_banner", "-filters"], capture_output=True, text=True, check=False)
    return any(line.split()[1:2] == [name] for line in listed.stdout.splitlines())


def video_filters(
    info: VideoInfo, *, fps: Fraction, size: tuple[int, int], fit: str, start: float, gap_seconds: float
) -> str:
    """Return filters to RGB frames of `size` (height, width), each the nearest source frame.

    The last frame is held for at most half of `gap_seconds`, also if the timestamp of the end is broken.
    """
    height, width = size
    middle = f"min((PTS+PREV_INPTS)/2,PREV_INPTS+{gap_seconds / 2:.6f}/TB)"
    within = "max" if fit == "crop" else "min"
    matrix = ":in_color_matrix=bt709" if not info.matrix and info.height >= 720 else ""
    scale = f"scale=w='round({within}({width},{height}*dar))':h='round({within}({height},{width}/dar))'{matrix}"
    fill = f"crop={width}:{height}" if fit == "crop" else f"pad={width}:{height}:-1:-1"
    return ",".join(
        [
            # One output per frame, at the time of its first field. One per field would double the cost.
            *(["yadif=deint=interlaced"] if info.interlaced else []),
            # A frame starts half way between the timestamp of its predecessor and its own; round=up then holds it.
            "settb=1/1000000",
            f"setpts='if(isnan(PREV_INPTS),PTS,{middle})-{start:.6f}/TB'",
            f"fps=fps={fps}:start_time=0:round=up",
            f"{scale}:flags=area" if info.width > 2 * width else f"{scale}:flags=bicubic",
            *(_tone_map(info) if info.transfer in HDR_TRANSFERS else []),
            fill,
            "setsar=1",
            "format=rgb24",
        ]
    )


def _tone_map(info: VideoInfo) -> list[str]:
    """Return filters from high dynamic range to bt709."""
    if not has_filter("zscale"):
        raise MediaError("hdr", "ffmpeg lacks the zscale filter (libzimg) to convert HDR to SDR")
    source = f"tin={info.transfer}:min=bt2020nc:pin=bt2020:rin=limited"
    return [
        f"zscale={source}:t=linear:npl={HDR_WHITE}",
        "format=gbrpf32le",
        "zscale=p=bt709",
        f"tonemap=mobius:param={TONE_KNEE}:desat=0",
        "zscale=t=bt709:m=bt709:r=limited",
        "format=yuv420p",
    ]


def gap_filter(name: str, seconds: float, start: float, *, report: bool) -> str:
    """Return the filter `name` (select or aselect) that drops frames more than `seconds` after the last one kept.

    The first frame is compared with `start`. With `report`, stderr has the timestamp of the first frame of each series
    that is dropped, and -1 after a series.
    """
    entering, leaving = ("print(max(0,t),16)", "print(-1,16)") if report else ("0", "0")
    late = f"gt(t-if(isnan(prev_selected_t),{start:.6f},prev_selected_t),{seconds:.6f})"
    return f"{name}='if({late},if(ld(0),0,0*({entering}+st(0,1))),if(ld(0),1+0*({leaving}+st(0,0)),1))'"


def scene_filters(target: str, threshold: float) -> str:
    """Return filters that write the numbers of frames with a scene score above `threshold`."""
    chosen = f"key={CUT_SCORE}:value={threshold}:function=greater"
    return f"scdet=threshold=100,metadata=mode=print:{chosen}:file='{target}':direct=1"


def audio_filters(sample_rate: int, start: float) -> str:
    """Return filters to mono audio with each sample at its timestamp, padded with silence."""
    return (
        f"asetpts='PTS-{start:.6f}/TB',"
        f"aresample=async=1000:min_comp={JITTER_SECONDS}:min_hard_comp={GAP_SECONDS},"
        f"aresample=async=1:first_pts=0:min_comp=0.0001:min_hard_comp={GAP_SECONDS},"
        f"aformat=sample_fmts=flt:sample_rates={sample_rate}:channel_layouts=mono"
    )
