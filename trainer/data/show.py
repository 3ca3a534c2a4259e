"""Records with their prompts exactly as generator and anchors see them: decoded from the token ids that they get."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from shared.config import Config
from shared.vlm import Prompt, load_prompt
from trainer.data import load_records
from trainer.data.check import examples, seen_by_tower
from trainer.data.records import Record

LATENT_START, LATENT_END = "<|latent_start|>", "<|latent_end|>"
"""As shared/vlm/generator.py names them, which loads torch and peft."""


def show_data(config: Config, split: str, n: int, seed: int, console: Console) -> None:
    """Print n records of a split, drawn at random, each with its questions of one kind, of as many kinds as there are.

    Anchors that read the same text share a line. Raises DataError, ModelError.
    """
    generator, prompts = load_prompt(config.generator.model), {}
    for anchor in config.all_anchors:
        model = config.generator.model if anchor.placement == "shared_base" else anchor.model
        prompts[anchor.name] = load_prompt(model)
    for record in examples(load_records(config.data, split), n, seed):
        console.rule(record.record_id)
        pictures = record.load_images()
        sizes = [picture.size for picture in pictures]
        for source, size in zip(record.images, sizes, strict=True):
            console.print(f"{source}  {size[0]}×{size[1]}", highlight=False, soft_wrap=True)
        seen = seen_by_tower(config.generator.model, set(sizes))
        tokens = [seen[size].tokens for size in sizes]
        _print(console, "generator", generator_prompt(generator, tokens, config.generator.latents))
        for number, question in enumerate(record.questions):
            texts = {name: anchor_prompt(p, record, number, config.generator.latents) for name, p in prompts.items()}
            for text in {text.plain: text for text in texts.values()}.values():
                names = ", ".join(name for name, read in texts.items() if read.plain == text.plain)
                _print(console, f"anchor {names}; {question.kind}", text)


def generator_prompt(prompt: Prompt, tokens: Sequence[int], latents: int) -> Text:
    """What the generator reads: its prompt with all images, then the latent tokens."""
    text = Text(_decoded(prompt, prompt.prefix_ids))
    for i, n in enumerate(tokens):
        text.append(_decoded(prompt, prompt.between_images_ids) if i else "")
        text.append(f"[{n} image tokens]", style="cyan")
    text.append(_decoded(prompt, prompt.after_image_ids) + LATENT_START)
    text.append(f"[{latents} latents]", style="magenta")
    return text.append(LATENT_END)


def anchor_prompt(prompt: Prompt, record: Record, question: int, latents: int) -> Text:
    """What an anchor reads of one question; the answer and the end of turn, whose likelihood counts, in green."""
    ((branch,),) = prompt.branches([[record.questions[question].message]])
    text = Text(_decoded(prompt, prompt.prefix_ids))
    text.append(f"[{latents} latents]", style="magenta")
    text.append(_decoded(prompt, branch.token_ids[: branch.answer_start]))
    return text.append(_decoded(prompt, branch.token_ids[branch.answer_start :]), style="bold green")


def _decoded(prompt: Prompt, ids: Sequence[int]) -> str:
    return str(prompt.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _print(console: Console, label: str, text: Text) -> None:
    console.print(Text.assemble((f"{label}: ", "bold"), text), highlight=False, soft_wrap=True)
