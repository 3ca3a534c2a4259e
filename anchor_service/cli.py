"""Command line of the anchor side."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from anchor_service.cluster import ray_if_needed
from anchor_service.pool import AnchorPool
from shared.cli import ConfigOption, SetOption, friendly_errors
from shared.config import Config, load_config
from shared.messages import PROTOCOL_VERSION, Gradient, Handshake, Question, ReadReply, ReadRequest
from shared.serve_config import load_serve_file
from shared.vlm import vlm_config

app = typer.Typer(
    no_args_is_help=True,
    help="Frozen anchors: start them, shake hands, read, serve; export their language models.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

_QUESTION = Question("what color is the circle?", "red")
_READS = 5


@app.command()
@friendly_errors
def probe(config: ConfigOption, set_: SetOption = None) -> None:
    """Start the anchors of a config, shake hands, read one question, print latency and memory.

    Placement shared_base needs the generator and is left out here. Ends every process that it started.

    Example: python -m anchor_service probe --config deploy/configs/toy.yaml
    """
    probe_anchors(load_config(Path(config), set_ or []), Console())


@app.command()
@friendly_errors
def serve(
    config: Annotated[str, typer.Option("--config", "-c", help="Ray Serve file; shipped ones lie in deploy/serve.")],
    port: Annotated[int | None, typer.Option(help="Instead of the file's.")] = None,
) -> None:
    """Serve a trained run on this machine until Ctrl-C: chat completions, latents, scores, a page to play with.

    Example: python -m anchor_service serve --config deploy/serve/toy.yaml
    """
    from anchor_service.serving.local import serve_here

    file = load_serve_file(Path(config))
    serve_here(file if port is None else file.model_copy(update={"port": port}), Console())


@app.command()
@friendly_errors
def export(
    config: ConfigOption,
    anchor: Annotated[str, typer.Option(help="Name of an anchor of the config, an unseen one too.")],
    to: Annotated[Path, typer.Option(help="Empty folder to write to.")],
    set_: SetOption = None,
) -> None:
    """Write an anchor's language model alone, without its vision tower, as an ordinary checkpoint with tokenizer.

    For engines that take prompt embeddings (vLLM): latents take the places of image tokens in them.

    Example: python -m anchor_service export --config deploy/configs/toy.yaml --anchor A --to runs/export/A
    """
    from anchor_service.export import export_anchor

    export_anchor(load_config(Path(config), set_ or []), anchor, to)
    Console().print(f"language model of {anchor}: {to}", highlight=False, soft_wrap=True)


def probe_anchors(config: Config, console: Console) -> None:
    """Print one line per anchor: family, width, image norm, latency of a read with gradient, peak memory."""
    anchors = [anchor for anchor in config.anchors if anchor.placement != "shared_base"]
    generator = Handshake(
        name=config.generator.model,
        protocol=PROTOCOL_VERSION,
        latents=config.generator.latents,
        width=vlm_config(config.generator.model).get_text_config().hidden_size,
        dtype=config.generator.dtype,
        family="",
        prompt="",
    )
    picture = io.BytesIO()
    Image.new("RGB", (224, 224), (200, 60, 60)).save(picture, "PNG")
    table = Table("anchor", "family", "width", "image norm", "read with gradient", "first read", "peak memory", "node")
    with ray_if_needed(config, anchors):
        started = time.perf_counter()
        with AnchorPool.start(config, generator, anchors=anchors, probe_images=[picture.getvalue()]) as pool:
            console.print(f"{len(anchors)} anchors ready after {time.perf_counter() - started:.1f} s")
            facts = pool.facts()
            for name in pool.names:
                shaken = pool.handshakes[name]
                times_ms = [_timed_read(pool, name, shaken) for _ in range(_READS)]
                peak = max((f.gpu_memory_bytes or f.peak_memory_bytes for f in facts[name]), default=0)
                table.add_row(
                    name,
                    shaken.family,
                    str(shaken.width),
                    f"{shaken.image_norm:.2f}",
                    f"{sorted(times_ms[1:])[(_READS - 1) // 2]:.1f} ms",
                    f"{times_ms[0]:.1f} ms",
                    f"{peak / 2**20:.0f} MiB" if peak else "in this process",
                    ", ".join(sorted({f.node for f in facts[name]})) or "-",
                )
    console.print(table)


def _timed_read(pool: AnchorPool, name: str, shaken: Handshake) -> float:
    """Milliseconds for one image, one question, with gradient."""
    latents = torch.zeros(1, shaken.latents, shaken.width, dtype=getattr(torch, shaken.dtype))
    request = ReadRequest(pool.new_request_id(), [[_QUESTION]], latents, Gradient.FUSED)
    started = time.perf_counter()
    replies: dict[str, ReadReply] = pool.read({name: request})
    assert name in replies
    return 1e3 * (time.perf_counter() - started)
