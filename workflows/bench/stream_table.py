"""Text table of the result of ``mfctl bench stream``."""

from workflows.bench import stream
from workflows.bench.stream import StreamBenchRow


def format_table(result: StreamBenchRow) -> str:
    """Format the result as a text table."""
    size, padded = ("x".join(map(str, edges)) for edges in (result["size"], result["padded"]))
    paper = (
        f"{result['paper_fps']:g} ({result['over_paper']:.2f} times)" if result["paper_fps"] else "none at this size"
    )
    speedup = result["cached_speedup"]
    decode = result["decode_ms"]
    switches = [name for name in ("compile", "graphs") if result[name]]
    gain: list[str] = []
    if switches:
        gain.append(
            f"{' and '.join(switches):24} {result['switch_speedup']:9.2f} times the speed without; difference "
            f"{result.get('switch_gap', 0.0):.0e}"
        )
    lines = [
        f"preset {result['preset']} at {size} (padded to {padded}), {result['steps']} steps and one cache pass, "
        f"{result['precision']} on {result['device']}, {result['threads']} thread(s)",
        f"{'frames per second':24} {result['fps']:9.2f}   ceiling by matrix products {result['fps_ceiling']:.1f}; "
        f"paper {paper}",
        f"{'first chunk':24} {1e3 * result['first_chunk_s']:9.1f} ms",
        f"{'chunk':24} {result['chunk_ms_p50']:9.1f} ms median, {result['chunk_ms_p99']:.1f} ms 99th percentile, of "
        f"{result['chunks']}; {result['seconds_per_second']:.2f} seconds of clip per second",
        f"{'late over early':24} {result['late_over_early']:9.3f}   "
        f"chunk {result['chunks']} over chunk {stream.EARLY_CHUNKS}; "
        f"memory {result['memory_late_over_early']:.3f}, peak {result['peak_memory_bytes'] / 1e6:.0f} MB",
        f"{'operations':24} {result['flops_per_s'] / 1e9:9.1f} GFLOP/s, {result['ratio_to_matmul']:.1%} of large "
        f"matrix products ({result['matmul_flops_per_s'] / 1e9:.1f}); {result['gflop_per_chunk']:.2f} GFLOP per chunk",
        *gain,
        result.get("not_compared", "")
        if speedup is None
        else f"{'with the cache':24} {speedup:9.1f} times the speed without at chunk {stream.CACHED_AT}, "
        f"{result.get('cached_speedup_prefix_once', 0.0):.1f} times with the prefix computed once per chunk; "
        f"difference {result.get('cached_gap', 0.0):.0e}",
        f"{'decoding per chunk':24} "
        + (", ".join(f"{m} {ms:.1f} ms" for m, ms in decode.items()) if decode else "not measured: needs weights"),
    ]
    return "\n".join(lines)
