"""Incremental PCA against scikit-learn's on all vectors at once; heads against plain sums."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from torch import Tensor

from shared.errors import DataError, ModelError
from tests.reference import max_relative_error
from trainer.gap.heads import IdentityHead, MlpHead, PcaHead, make_head
from trainer.gap.pca import IncrementalPca, VisualPca, load_pca
from trainer.losses import coefficient_loss

WIDTH = 12


def vectors(n: int, seed: int = 0, offset: float = 3.0) -> Tensor:
    """Correlated directions of falling variance around a mean far from zero, float64."""
    noise = torch.Generator().manual_seed(seed)
    mix_DD = torch.randn(WIDTH, WIDTH, generator=noise, dtype=torch.float64)
    scales_D = 0.6 ** torch.arange(WIDTH, dtype=torch.float64)
    return (torch.randn(n, WIDTH, generator=noise, dtype=torch.float64) * scales_D) @ mix_DD + offset


def fitted(batches: list[Tensor], **how) -> VisualPca:
    pca = IncrementalPca(WIDTH)
    for batch_ND in batches:
        pca.update(batch_ND)
    return pca.fit(**how)


@pytest.mark.parametrize("how", [{"variance": 0.95}, {"variance": 0.5}, {"n_components": 1}, {"n_components": WIDTH}])
@pytest.mark.parametrize("sizes", [[200], [1, 7, 64, 128], [1] * 200])
def test_equals_sklearn(how, sizes):
    vectors_ND = vectors(200)
    ours = fitted(list(vectors_ND.split(sizes)), **how)
    theirs = PCA(how.get("n_components") or how["variance"], svd_solver="full").fit(vectors_ND.numpy())
    assert ours.n_components == theirs.n_components_
    assert ours.n_vectors == 200
    np.testing.assert_allclose(ours.mean_D, theirs.mean_, rtol=1e-10)
    np.testing.assert_allclose(ours.explained_variance_d, theirs.explained_variance_, rtol=1e-8)
    assert ours.explained_share == pytest.approx(theirs.explained_variance_ratio_.sum(), rel=1e-9)
    # Directions may differ in sign, the subspace and each axis may not.
    cosines_d = np.abs((ours.basis_Dd.numpy().T * theirs.components_).sum(axis=1))
    np.testing.assert_allclose(cosines_d, 1, atol=1e-9)
    np.testing.assert_allclose(ours.basis_Dd @ ours.basis_Dd.T, theirs.components_.T @ theirs.components_, atol=1e-8)
    np.testing.assert_allclose(
        ours.project(vectors_ND), theirs.inverse_transform(theirs.transform(vectors_ND.numpy())), atol=1e-8
    )


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=5), order=st.randoms(use_true_random=False))
def test_the_order_and_the_size_of_batches_change_nothing(cuts, order):
    vectors_ND = vectors(60)
    edges = [0, *sorted(cuts), 60]
    batches = [vectors_ND[a:b] for a, b in itertools.pairwise(edges)]
    order.shuffle(batches)
    ours, whole = fitted(batches, n_components=4), fitted([vectors_ND], n_components=4)
    torch.testing.assert_close(ours.mean_D, whole.mean_D, rtol=1e-10, atol=0)
    torch.testing.assert_close(ours.explained_variance_d, whole.explained_variance_d, rtol=1e-9, atol=0)
    torch.testing.assert_close(ours.basis_Dd, whole.basis_Dd, rtol=0, atol=1e-9)
    assert ours.total_variance == pytest.approx(whole.total_variance, rel=1e-10)


def test_a_large_mean_costs_no_precision():
    """Sums of squares would lose every digit here: variance 1 around a mean of 1e8."""
    near, far = fitted(list(vectors(120).split(7))), fitted(list((vectors(120) + 1e8).split(7)))
    torch.testing.assert_close(near.explained_variance_d, far.explained_variance_d, rtol=1e-6, atol=0)


def test_memory_is_one_scatter_matrix():
    pca = IncrementalPca(WIDTH)
    for batch_ND in vectors(5000).split(100):
        pca.update(batch_ND)
    held = sum(value.numel() for value in vars(pca).values() if isinstance(value, Tensor))
    assert held == WIDTH * WIDTH + WIDTH


def test_what_cannot_be_fitted():
    with pytest.raises(DataError, match="0 visual embeddings span 0 directions"):
        IncrementalPca(WIDTH).fit()
    with pytest.raises(DataError, match="4 visual embeddings span 3 directions, 4 components are asked for; use more"):
        fitted([vectors(4)], n_components=4)
    with pytest.raises(DataError, match="span 0 directions"):
        fitted([torch.ones(5, WIDTH)])
    with pytest.raises(DataError, match="NaN or infinite"):
        fitted([torch.full((1, WIDTH), torch.nan)])
    with pytest.raises(ValueError, match="shape"):
        fitted([torch.ones(5, WIDTH + 1)])


def test_save_and_load(tmp_path):
    pca = fitted([vectors(50)])
    pca.save(tmp_path / "pca.safetensors")
    again = load_pca(tmp_path / "pca.safetensors", WIDTH)
    for name in ("mean_D", "basis_Dd", "explained_variance_d"):
        assert torch.equal(getattr(pca, name), getattr(again, name))
    assert (again.total_variance, again.n_vectors) == (pca.total_variance, pca.n_vectors)
    with pytest.raises(ModelError, match=r"width 12, the model of 64; fit one"):
        load_pca(tmp_path / "pca.safetensors", 64)
    (tmp_path / "pca.safetensors").write_bytes(b"no such format")
    with pytest.raises(ModelError, match="no PCA of visual embeddings"):
        load_pca(tmp_path / "pca.safetensors")
    with pytest.raises(ModelError, match="no PCA of visual embeddings"):
        load_pca(tmp_path / "absent")


@settings(max_examples=50, deadline=None)
@given(scale=st.floats(1e-3, 1e4), seed=st.integers(0, 99), n_components=st.integers(1, WIDTH - 1))
def test_latents_of_the_pca_head_stay_in_the_affine_subspace(scale, seed, n_components):
    pca = fitted([vectors(50)], n_components=n_components)
    torch.manual_seed(seed)
    latents_BKD = PcaHead(pca)(scale * torch.randn(2, 3, WIDTH)).detach().double()
    off_BKD = latents_BKD - pca.project(latents_BKD)
    assert off_BKD.norm(dim=-1).max() <= 1e-6 * latents_BKD.norm(dim=-1).max()


def test_pca_head_against_plain_sums():
    pca = fitted([vectors(50)], n_components=3)
    head = PcaHead(pca).double()
    hidden_D = torch.randn(WIDTH, dtype=torch.float64)
    weight, bias = head.linear.weight, head.linear.bias
    c = [sum(weight[i, j] * hidden_D[j] for j in range(WIDTH)) + bias[i] for i in range(3)]
    latent = [sum(pca.basis_Dd[j, i] * c[i] for i in range(3)) + pca.mean_D[j] for j in range(WIDTH)]
    torch.testing.assert_close(head.coefficients(hidden_D), torch.stack(c))
    # The head keeps its basis in float32.
    torch.testing.assert_close(head(hidden_D), torch.stack(latent), rtol=1e-5, atol=1e-5)
    assert {name for name, p in head.named_parameters() if p.requires_grad} == {"linear.weight", "linear.bias"}
    assert {"mean_D", "basis_Dd"} <= set(head.state_dict())


def test_targets_are_coefficients_that_give_back_what_the_subspace_holds():
    pca = fitted([vectors(50)], n_components=WIDTH)
    head, v_BKD = PcaHead(pca), vectors(6, seed=3).float().unflatten(0, (2, 3))
    torch.testing.assert_close(head.target(v_BKD) @ head.basis_Dd.T + head.mean_D, v_BKD, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.target(v_BKD).double(), pca.coefficients(v_BKD), rtol=1e-4, atol=1e-4)
    assert not head.target(v_BKD.requires_grad_()).requires_grad


def test_coefficient_loss_against_a_loop_and_its_unit():
    predicted_BKd, target_BKd = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    expected = 0.0
    for b in range(2):
        for k in range(3):
            expected += sum((predicted_BKd[b, k, i] - target_BKd[b, k, i]) ** 2 for i in range(4)) / (2 * 3)
    torch.testing.assert_close(coefficient_loss(predicted_BKd, target_BKd, 2.5), expected / 2.5)
    pca = fitted([vectors(400)])
    head = PcaHead(pca)
    target_1Nd = head.target(vectors(400))[None]
    at_mean = coefficient_loss(torch.zeros_like(target_1Nd), target_1Nd, head.variance)
    assert float(at_mean) == pytest.approx(399 / 400, rel=1e-5)


def test_gradients_of_head_and_loss():
    head = PcaHead(fitted([vectors(50)], n_components=3)).double()
    hidden_KD = torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(head, (hidden_KD,))
    target_Kd = head.target(vectors(4, seed=2))
    loss = coefficient_loss(head.coefficients(hidden_KD), target_Kd, head.variance)
    loss.backward()
    difference_Kd = (head.coefficients(hidden_KD) - target_Kd).detach()
    expected_dD = 2 * difference_Kd.T @ hidden_KD.detach() / 4 / head.variance
    torch.testing.assert_close(head.linear.weight.grad, expected_dD, rtol=1e-5, atol=1e-6)


def test_plain_heads_and_the_table():
    hidden_BD = torch.randn(2, WIDTH)
    assert make_head("identity", WIDTH)(hidden_BD) is hidden_BD
    mlp = make_head("mlp", WIDTH)
    inner_BD = torch.nn.functional.gelu(hidden_BD @ mlp.inner.weight.T + mlp.inner.bias)
    expected = inner_BD @ mlp.outer.weight.T + mlp.outer.bias
    torch.testing.assert_close(mlp(hidden_BD), expected)
    assert mlp(hidden_BD.bfloat16()).dtype is torch.float32
    pca = fitted([vectors(50)])
    kinds = {"identity": IdentityHead, "mlp": MlpHead, "pca": PcaHead}
    assert {kind: type(make_head(kind, WIDTH, pca)) for kind in kinds} == kinds
    for wrong, width, message in ((None, WIDTH, "none is given"), (pca, 8, "this one has width 12")):
        with pytest.raises(ModelError, match=message):
            make_head("pca", width, wrong)


def test_the_subspace_is_that_of_what_was_seen():
    """Vectors of a plane: two components explain all, and a vector off the plane is projected onto it."""
    plane_ND = torch.randn(40, 2, dtype=torch.float64) @ torch.randn(2, WIDTH, dtype=torch.float64) + 1
    pca = fitted([plane_ND], variance=0.999)
    assert pca.n_components <= 2
    pca = fitted([plane_ND], n_components=2)
    off_ND = plane_ND + torch.randn(40, WIDTH, dtype=torch.float64)
    assert max_relative_error(pca.project(pca.project(off_ND)), pca.project(off_ND)) <= 1e-10
    assert max_relative_error(pca.project(plane_ND), plane_ND) <= 1e-10
