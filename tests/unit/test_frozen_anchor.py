"""A frozen anchor's numbers and gradients equal plain autograd, directly and through the bridge."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from anchor_service.frozen_anchor import FrozenAnchor, check_handshake
from anchor_service.pool import AnchorPool
from shared.config import Config, parse_config
from shared.errors import AnchorCallError, DataError, HandshakeError, ModelError
from shared.messages import PROTOCOL_VERSION, Gradient, Handshake, LatentPositions, Question, ReadRequest
from shared.packing import Media, latent_media
from shared.reading import nll_per_image, pack_questions, score_answers
from shared.vlm import VisionLanguageModel, load_vlm
from tests.reference import max_relative_error, plain_greedy, plain_nll, plain_read_all, plain_read_image
from tests.tiny_models import FAMILY_NAMES, WIDTH
from trainer.bridge import AnchorBridge

N_LATENTS = 4


def make_latents(n_images: int, n_latents: int = N_LATENTS, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    noise = torch.randn(n_images, n_latents, WIDTH, generator=torch.Generator().manual_seed(5))
    return (2 * noise).to(dtype)


def make_anchor(model: VisionLanguageModel, positions: LatentPositions = LatentPositions.TEXT) -> FrozenAnchor:
    return FrozenAnchor("A", model, N_LATENTS, positions)


def png(picture) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("count_end_of_turn", [True, False])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_fused_gradient_is_plain_autograds(tiny_model, questions, family, count_end_of_turn):
    model = tiny_model(family)
    latents_BKD = make_latents(len(questions)).requires_grad_()
    nll_B = plain_nll(plain_read_all(model, latents_BKD, questions), count_end_of_turn)
    (expected,) = torch.autograd.grad(nll_B.sum(), latents_BKD)

    request = ReadRequest("r", questions, latents_BKD.detach(), Gradient.FUSED, count_end_of_turn=count_end_of_turn)
    reply = make_anchor(model).read(request)
    assert max_relative_error(torch.tensor(nll_per_image(reply.logprobs, count_end_of_turn)), nll_B) <= 1e-5
    assert max_relative_error(reply.latents_grad, expected) <= 1e-5
    assert all(parameter.grad is None for parameter in model.hf_model.parameters())
    assert latents_BKD.grad is None


def test_a_read_keeps_activations_of_its_own_rows_and_no_logits(tiny_model, questions):
    """What autograd keeps between forward and backward is bounded by the rows' activations.

    The bound is that of `trainer.estimate` for a frozen float32 model: 7 widths and 3 feed-forward widths a token
    and layer. Weights are kept by reference and cost nothing.
    """
    model = tiny_model("qwen2_5_vl")
    weights = {p.untyped_storage().data_ptr() for p in model.hf_model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    anchor, latents_BKD = make_anchor(model), make_latents(len(questions))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        anchor.read(ReadRequest("r", questions, latents_BKD, Gradient.FUSED))
    rows = pack_questions(model, [[Media(N_LATENTS)]] * len(questions), questions, cache_prefix=True)
    text = model.hf_model.config.get_text_config()
    n_tokens = rows.token_ids_BT.numel()
    bound = 4 * (text.num_hidden_layers + 1) * n_tokens * (7 * text.hidden_size + 3 * text.intermediate_size)
    assert 0.3 * bound < sum(kept.values()) < bound


def test_vjp_gradient_with_given_token_weights_on_a_grid(tiny_model, questions):
    model = tiny_model("qwen3_vl")
    latents_BKD = make_latents(len(questions)).requires_grad_()
    logprobs = plain_read_all(model, latents_BKD, questions, on_grid=True)
    generator = torch.Generator().manual_seed(6)
    weights = [[torch.randn(len(q), generator=generator).tolist() for q in row] for row in logprobs]
    total = sum(
        (tokens * torch.tensor(w)).sum()
        for row, row_weights in zip(logprobs, weights, strict=True)
        for tokens, w in zip(row, row_weights, strict=True)
    )
    (expected,) = torch.autograd.grad(total, latents_BKD)

    anchor = make_anchor(model, LatentPositions.GRID)
    request = ReadRequest("r", questions, latents_BKD.detach(), Gradient.VJP, weights)
    assert max_relative_error(anchor.read(request).latents_grad, expected) <= 1e-5
    with pytest.raises(AnchorCallError, match="needs token_weights"):
        anchor.read(replace(request, token_weights=None))


def test_bf16_gradient_is_as_close_as_another_bf16_ordering(tiny_folder, tiny_model, questions):
    """Packed and one-row-per-question are two orderings of the same bf16 sums; neither may be much worse."""
    latents_BKD = make_latents(len(questions), dtype=torch.bfloat16)

    def plain_gradient(model: VisionLanguageModel) -> torch.Tensor:
        leaf = latents_BKD.to(model.dtype).requires_grad_()
        nll_B = plain_nll([[t.float() for t in row] for row in plain_read_all(model, leaf, questions)])
        return torch.autograd.grad(nll_B.sum(), leaf)[0].float()

    bf16 = tiny_model("qwen2_5_vl", "bfloat16")
    exact = plain_gradient(load_vlm(tiny_folder("qwen2_5_vl", "bfloat16"), "float32").freeze())
    other_ordering = float((plain_gradient(bf16) - exact).norm() / exact.norm())
    reply = make_anchor(bf16).read(ReadRequest("r", questions, latents_BKD, Gradient.FUSED))
    assert reply.latents_grad.dtype is torch.bfloat16
    error = float((reply.latents_grad.float() - exact).norm() / exact.norm())
    assert 1e-3 < other_ordering < 0.1
    assert error <= 1.5 * other_ordering


def test_matches_say_what_greedy_decoding_would_write(tiny_folder, questions):
    """The head learns half of the answers by heart, so that both outcomes occur."""
    model = load_vlm(tiny_folder("llava")).freeze()
    latents_BKD = make_latents(len(questions))
    learned = [questions[0][:2], [Question("how many things are there?", "3")], questions[2][:1]]
    media = [[Media(N_LATENTS)]] * len(questions)
    head = model.hf_model.lm_head.weight.requires_grad_()
    optimizer = torch.optim.AdamW([head], lr=0.05)
    for _ in range(30):
        scores = score_answers(model, pack_questions(model, media, learned), latents_BKD.flatten(0, 1))
        optimizer.zero_grad()
        (-scores.logprobs_N.mean()).backward()
        optimizer.step()
    model.freeze()

    with torch.no_grad():
        reply = make_anchor(model).read(ReadRequest("r", questions, latents_BKD, with_answers=True))
        matches, outcomes, to_text = reply.matches, set(), model.processor.tokenizer.decode
        for b, row in enumerate(questions):
            for q, question in enumerate(row):
                decoded, answer = plain_greedy(model, latents_BKD[b], question)
                same = [d == a for d, a in zip(decoded, answer, strict=True)]
                first_wrong = same.index(False) if False in same else len(same)
                assert matches[b][q][: first_wrong + 1] == same[: first_wrong + 1]
                written = to_text(decoded[: first_wrong + 1], skip_special_tokens=True).strip()
                assert reply.answers[b][q] == written
                outcomes.add(all(matches[b][q]))
                assert all(matches[b][q]) == (decoded == answer)
    assert outcomes == {True, False}


@torch.no_grad()
def test_ceiling_and_floor(tiny_model, questions, pictures):
    model = tiny_model("smolvlm")
    anchor = make_anchor(model)
    ceiling = anchor.read_images("i", [[png(picture)] for picture in pictures], questions)
    floor = anchor.read(ReadRequest("r", questions, None))
    floor_reference = plain_read_all(model, None, questions)
    for b, row in enumerate(questions):
        for q, question in enumerate(row):
            reference = plain_read_image(model, pictures[b], 9, question)
            assert max_relative_error(torch.tensor(ceiling.logprobs[b][q]), reference) <= 1e-5
            assert max_relative_error(torch.tensor(floor.logprobs[b][q]), floor_reference[b][q]) <= 1e-5
    assert (ceiling.request_id, floor.request_id, floor.anchor) == ("i", "r", "A")


@pytest.mark.parametrize("positions", list(LatentPositions))
@torch.no_grad()
def test_fewer_latents_are_the_first_ones(tiny_model, questions, positions):
    """The first three of a 2×2 grid keep their cells, and the text goes on behind the whole grid."""
    model, latents_BKD = tiny_model("qwen2_5_vl"), make_latents(len(questions))
    reply = make_anchor(model, positions).read(ReadRequest("r", questions, latents_BKD[:, :3].contiguous()))
    media = replace(latent_media(N_LATENTS, positions is LatentPositions.GRID), length=3)
    rows = pack_questions(model, [[media]] * len(questions), questions)
    expected_N = score_answers(model, rows, latents_BKD[:, :3].flatten(0, 1)).logprobs_N
    actual_N = torch.tensor([v for row in reply.logprobs for q in row for v in q])
    assert max_relative_error(actual_N, expected_N) <= 1e-5
    if positions is LatentPositions.TEXT:
        plain = plain_read_all(model, latents_BKD[:, :3], questions)
        assert max_relative_error(actual_N, torch.cat([q for row in plain for q in row])) <= 1e-5
    else:
        assert rows.positions_3BT[:, 0, rows.media_BT[0]].T.tolist() == [
            [rows.positions_3BT[0, 0, rows.media_BT[0]][0].item() + d for d in cell]
            for cell in ((0, 0, 0), (0, 0, 1), (0, 1, 0))
        ]


@torch.no_grad()
def test_without_markers_is_a_conversation_without_image(tiny_model, questions):
    model = tiny_model("qwen2_5_vl")
    reply = make_anchor(model).read(ReadRequest("r", questions, None, image_markers=False))
    for row, row_logprobs in zip(questions, reply.logprobs, strict=True):
        (branches,) = model.prompt_without_image.branches([row])
        for branch, logprobs in zip(branches, row_logprobs, strict=True):
            ids = torch.tensor([[*model.prompt_without_image.prefix_ids, *branch.token_ids]])
            logits_TV = model.hf_model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            expected = logits_TV.gather(1, ids[0, 1:, None])[-branch.n_answer :, 0]
            assert max_relative_error(torch.tensor(logprobs), expected) <= 1e-5
    floor = make_anchor(model).read(ReadRequest("r", questions, None))
    assert floor.logprobs != reply.logprobs


def test_requests_that_cannot_be_answered(tiny_model, questions):
    anchor = make_anchor(tiny_model("llava"))
    for shape in ((3, N_LATENTS + 1, WIDTH), (3, N_LATENTS, WIDTH // 2), (2, N_LATENTS, WIDTH)):
        with pytest.raises(AnchorCallError, match=r"anchor A: latents of shape .* expected \(3, 4, 32\)"):
            anchor.read(ReadRequest("r", questions, torch.zeros(shape)))
    with pytest.raises(AnchorCallError, match="no gradient without latents"):
        anchor.read(ReadRequest("r", questions, None, Gradient.FUSED))
    with pytest.raises(AnchorCallError, match="no place without the image's markers"):
        anchor.read(ReadRequest("r", questions, make_latents(3), image_markers=False))
    with pytest.raises(DataError, match="has no tokens"):
        anchor.read(ReadRequest("r", [[Question("what?", "  ")]], make_latents(1)))
    with pytest.raises(HandshakeError, match=r"llava has no image grid; set pool\.latent_positions: text"):
        make_anchor(tiny_model("llava"), LatentPositions.GRID)


READ_WITH_LITTLE_MEMORY = """
import resource, sys
import torch
from anchor_service.frozen_anchor import FrozenAnchor
from shared.errors import AnchorCallError
from shared.messages import Gradient, LatentPositions, Question, ReadRequest
from shared.vlm import load_vlm

torch.set_num_threads(1)
model = load_vlm(sys.argv[1]).freeze()
anchor = FrozenAnchor("A", model, 4, LatentPositions.TEXT)

def read(n_images):
    questions = [[Question("is there a red square?", "no")] * 8] * n_images
    return anchor.read(ReadRequest("r", questions, torch.zeros(n_images, 4, model.width), Gradient.FUSED))

read(2)
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + 64 * 2**20,) * 2)
try:
    read(4000)
except AnchorCallError as error:
    print(error)
read(2)
print("still reads")
"""


def test_out_of_memory_is_named_and_the_anchor_lives_on(tiny_folder):
    """In a process of its own, whose address space is closed after the first read."""
    command = [sys.executable, "-c", READ_WITH_LITTLE_MEMORY, tiny_folder("qwen2_5_vl")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    message, after = done.stdout.splitlines()
    assert re.match(
        r"anchor A: out of memory reading 4000 images; lower train\.batch_images .* or add replicas$", message
    )
    assert after == "still reads"


def test_damaged_weights_are_named(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("llava"), tmp_path / "damaged")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"damaged: the model cannot be loaded \(.*\); if a file is damaged, copy"):
        load_vlm(str(folder))


def test_handshake(tiny_model, pictures):
    model = tiny_model("qwen2_vl")
    shaken = make_anchor(model).handshake([png(picture) for picture in pictures])
    norms = [float(token.norm()) for tokens in model.image_tokens(pictures).tokens for token in tokens]
    assert shaken.image_norm == pytest.approx(sum(norms) / len(norms), rel=1e-5)
    assert (shaken.latents, shaken.width, shaken.dtype, shaken.family) == (N_LATENTS, WIDTH, "float32", "qwen2_vl")
    check_handshake(shaken, replace(shaken, name="generator", prompt="another"))
    for field, value in {"protocol": 0, "latents": 5, "width": 64, "dtype": "bfloat16"}.items():
        with pytest.raises(HandshakeError, match=f"generator G has {field} {value}, anchor A has {field} "):
            check_handshake(shaken, replace(shaken, name="G", **{field: value}))


def double_config(folders: list[str], mode: str) -> Config:
    anchors = [
        {"name": f"R{i}", "model": folder, "placement": "local", "dtype": "float64", "weight": 1.0 + 2 * i}
        for i, folder in enumerate(folders)
    ]
    tree = {
        "run": {"dir": "unused"},
        "generator": {"model": folders[0], "latents": N_LATENTS},
        "anchors": anchors,
        "pool": {"mode": mode},
        "data": {"path": "unused"},
    }
    return parse_config(tree, "test")


@pytest.fixture
def double_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' norms go through float32 even in a float64 model, too coarse for finite differences."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

    def forward(self, hidden):
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    norm_classes = {LlamaRMSNorm, *(c for name, c in vars(qwen).items() if name.endswith("RMSNorm"))}
    for norm_class in norm_classes:
        monkeypatch.setattr(norm_class, "forward", forward)


@pytest.mark.usefixtures("double_norms")
@pytest.mark.parametrize("mode", ["fused", "vjp"])
def test_gradcheck_through_the_bridge(tiny_folder, questions, mode):
    """Two anchors of two families and unequal weights, under a loss that is not linear in the NLLs."""
    config = double_config([tiny_folder(f, "float64") for f in ("llava", "qwen2_5_vl")], mode)
    generator = Handshake("test", PROTOCOL_VERSION, N_LATENTS, WIDTH, "float64", "llava", "")
    with AnchorPool.start(config, generator) as pool:
        bridge = AnchorBridge(pool, Gradient(mode), count_end_of_turn=True)

        def loss(latents_BKD: torch.Tensor) -> torch.Tensor:
            read = bridge.read(latents_BKD, questions[:2])
            assert read.weights_R.tolist() == [0.25, 0.75]
            return (read.weights_R[:, None] * read.nll_RB.square()).sum() + read.nll_RB.prod()

        latents_BKD = make_latents(2, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(loss, (latents_BKD,), eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=True)
        (first,) = torch.autograd.grad(loss(latents_BKD), latents_BKD, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


def test_the_bridge_needs_a_gradient():
    with pytest.raises(ValueError, match="fused or vjp"):
        AnchorBridge(AnchorPool([], double_config(["m"], "vjp").pool, {}), Gradient.NONE, count_end_of_turn=True)
