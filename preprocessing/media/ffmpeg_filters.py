"""The ffmpeg filters that put a picture and its sound on one clock: see the top of ``media`` for what they promise."""

import subprocess
from fractions import Fraction
from functools import cache

from preprocessing.media.probe import MediaError, VideoInfo

HDR_TRANSFERS = ("smpte2084", "arib-std-b67")  # PQ and HLG
HDR_WHITE = 203  # nits that become SDR white: the diffuse white of ITU-R BT.2408 (signal 0.75 in HLG)
TONE_KNEE = 0.8  # of SDR white: what is darker keeps its luminance, what is brighter is rolled off
# A stream of timestamps in milliseconds (Matroska, FLV) jitters by one; sound that drifts further from its timestamps
# is stretched back within a second, sound that is further off than the gap is padded or cut at once.
JITTER_SECONDS, GAP_SECONDS = 0.001, 0.005
CUT_SCORE = "lavfi.scd.score"


@cache
def has_filter(name: str) -> bool:
    """Whether the installed ffmpeg was built with a filter."""
    listed = subprocess.run(["ffmpeg", "-hide_banner", "-filters"], capture_output=True, text=True, check=False)
    return any(line.split()[1:2] == [name] for line in listed.stdout.splitlines())


def video_filters(info: VideoInfo, *, fps: Fraction, size: tuple[int, int], fit: str, start: float) -> str:
    """Nearest source frame per output instant, upright, square pixels, 8 bits, exactly ``size`` = (height, width)."""
    height, width = size
    within = "max" if fit == "crop" else "min"
    matrix = ":in_color_matrix=bt709" if not info.matrix and info.height >= 720 else ""
    scale = f"scale=w='round({within}({width},{height}*dar))':h='round({within}({height},{width}/dar))'{matrix}"
    fill = f"crop={width}:{height}" if fit == "crop" else f"pad={width}:{height}:-1:-1"
    return ",".join(
        [
            # One frame per frame, at the time of its first field. (One per field would show every instant twice as
            # well as the half source frame asks for, at twice the cost.)
            *(["yadif=deint=interlaced"] if info.interlaced else []),
            # A frame takes over half way between its predecessor's timestamp and its own; round=up then holds it.
            "settb=1/1000000",
            f"setpts='if(isnan(PREV_INPTS),PTS,(PTS+PREV_INPTS)/2)-{start:.6f}/TB'",
            f"fps=fps={fps}:start_time=0:round=up",
            f"{scale}:flags=area" if info.width > 2 * width else f"{scale}:flags=bicubic",
            *(_tone_map(info) if info.transfer in HDR_TRANSFERS else []),
            fill,
            "setsar=1",
            "format=rgb24",
        ]
    )


def _tone_map(info: VideoInfo) -> list[str]:
    """High dynamic range to bt709."""
    if not has_filter("zscale"):
        raise MediaError("hdr", "this ffmpeg has no zscale filter (libzimg) to turn HDR into SDR")
    source = f"tin={info.transfer}:min=bt2020nc:pin=bt2020:rin=limited"
    return [
        f"zscale={source}:t=linear:npl={HDR_WHITE}",
        "format=gbrpf32le",
        "zscale=p=bt709",
        f"tonemap=mobius:param={TONE_KNEE}:desat=0",
        "zscale=t=bt709:m=bt709:r=limited",
        "format=yuv420p",
    ]


def scene_filters(target: str, threshold: float) -> str:
    """Write the number of every frame that differs much from the one before, before that frame leaves ffmpeg."""
    chosen = f"key={CUT_SCORE}:value={threshold}:function=greater"
    return f"scdet=threshold=100,metadata=mode=print:{chosen}:file='{target}':direct=1"


def audio_filters(sample_rate: int, start: float) -> str:
    """Mono at ``sample_rate``, each sample at its timestamp: silence before and in gaps, early sound cut."""
    return (
        f"asetpts='PTS-{start:.6f}/TB',"
        f"aresample=async=1000:min_comp={JITTER_SECONDS}:min_hard_comp={GAP_SECONDS},"
        f"aresample=async=1:first_pts=0:min_comp=0.0001:min_hard_comp={GAP_SECONDS},"
        f"aformat=sample_fmts=flt:sample_rates={sample_rate}:channel_layouts=mono"
    )
