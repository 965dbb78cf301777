"""Hook factories as algebra, and attaching that cannot fail in silence."""

import einops
import pytest
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.hook_points import HookPoint

from blockem_tl import HookNotFired, ablate, attached, clamp, patch, record, steer
from blockem_tl.hooks import Step, current_step, step

SITE = "blocks.1.hook_resid_post"


@pytest.fixture
def hooked() -> HookedTransformer:
    torch.manual_seed(0)
    config = HookedTransformerConfig(n_layers=3, d_model=32, n_ctx=16, d_head=8, n_heads=4, d_vocab=64, act_fn="gelu", device="cpu")
    return HookedTransformer(config).eval()


@pytest.fixture(params=["bridge", "HookedTransformer"])
def model(request: pytest.FixtureRequest):
    """The same factories on both model classes."""
    return request.getfixturevalue("tiny" if request.param == "bridge" else "hooked")


def site_after(model, tokens, hooks):
    """The site's activation after ``hooks`` have acted."""
    store = {}
    with attached(model, [*hooks, record(SITE, store)]):
        model(tokens)
    return store[SITE]


@pytest.fixture
def directions():
    return torch.randn(3, 32, generator=torch.Generator().manual_seed(2))


def test_steering_adds_dose_times_scale_times_direction(model, tokens, directions) -> None:
    before, after = site_after(model, tokens, []), site_after(model, tokens, [steer(SITE, directions[0], 0.7, scale=3.0)])
    torch.testing.assert_close(after, before + 0.7 * 3.0 * directions[0])


def test_dose_zero_changes_no_logit_and_a_dose_does(model, tokens, directions) -> None:
    plain = model(tokens)
    with attached(model, [steer(SITE, directions[0], 0.0)]):
        assert torch.equal(model(tokens), plain)
    with attached(model, [steer(SITE, directions[0], 1.0)]):
        assert not torch.allclose(model(tokens), plain)


def test_steering_each_row_equals_steering_it_alone(model, tokens, directions) -> None:
    doses = torch.tensor([0.5, 0.0, -2.0])
    together = site_after(model, tokens, [steer(SITE, directions, doses)])
    for row in range(3):
        alone = site_after(model, tokens[row : row + 1], [steer(SITE, directions[row], float(doses[row]))])
        torch.testing.assert_close(together[row : row + 1], alone)


def test_ablation_removes_the_span_and_nothing_else(model, tokens, directions) -> None:
    repeated = torch.cat([directions[:2], 2 * directions[:1]])  # three rows, two dimensions
    before, after = site_after(model, tokens, []), site_after(model, tokens, [ablate(SITE, repeated)])
    q, _ = torch.linalg.qr(directions[:2].T)
    torch.testing.assert_close(after, before - (before @ q) @ q.T, atol=1e-4, rtol=1e-4)
    assert (after @ directions[:2].T).abs().max() < 1e-3 < (after @ directions[2]).abs().max()


def test_clamp_moves_one_coordinate_into_its_bounds(model, tokens, directions) -> None:
    unit = directions[0] / directions[0].norm()
    before, after = site_after(model, tokens, []), site_after(model, tokens, [clamp(SITE, directions[0], -0.1, 0.1)])
    torch.testing.assert_close(after @ unit, (before @ unit).clamp(-0.1, 0.1), atol=1e-4, rtol=1e-4)
    across = before - einops.einsum(before @ unit, unit, "batch pos, d -> batch pos d")
    torch.testing.assert_close(after - einops.einsum(after @ unit, unit, "batch pos, d -> batch pos d"), across, atol=1e-4, rtol=1e-4)
    assert (before @ unit).abs().max() > 0.1  # the clamp had something to do


def test_patching_own_states_changes_nothing_and_others_states_do(model, tokens) -> None:
    plain, own = model(tokens), site_after(model, tokens, [])
    other = site_after(model, tokens.flip(0), [])
    with attached(model, [patch(SITE, own)]):
        assert torch.equal(model(tokens), plain)
    with attached(model, [patch(SITE, other)]):
        assert not torch.allclose(model(tokens), plain)
    where = torch.zeros(tokens.shape, dtype=torch.bool)
    where[0, 4] = True
    partly = site_after(model, tokens, [patch(SITE, other, where)])
    assert torch.equal(partly[0, 4], other[0, 4]) and torch.equal(partly[1:], own[1:]) and torch.equal(partly[0, :4], own[0, :4])


def test_hooks_mutate_nothing(directions) -> None:
    activation = torch.randn(3, 5, 32)
    kept = activation.clone()
    for _, fn in (steer(SITE, directions), ablate(SITE, directions), clamp(SITE, directions[0], 0.0), patch(SITE, kept + 1)):
        assert fn(activation, hook=HookPoint()) is not None
        assert torch.equal(activation, kept)


def test_recorder_keeps_the_graph_only_when_asked(tiny, tokens) -> None:
    tiny.add_adapter()
    for detach in (True, False):
        store = {}
        tiny.run_with_hooks(tokens, fwd_hooks=[record(SITE, store, detach=detach)])
        assert store[SITE].requires_grad is not detach


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: steer(SITE, torch.full((32,), float("nan"))), "finite"),
        (lambda: steer(SITE, torch.ones(32), float("inf")), "finite"),
        (lambda: steer(SITE, torch.ones(2, 2, 32)), r"\[d_model\] or \[batch, d_model\]"),
        (lambda: ablate(SITE, torch.zeros(32)), "non-zero"),
        (lambda: clamp(SITE, torch.ones(32)), "at least one"),
        (lambda: clamp(SITE, torch.ones(32), 2.0, 1.0), "low <= high"),
        (lambda: clamp(SITE, torch.zeros(32), 0.0), "non-zero"),
    ],
)
def test_impossible_hooks_are_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (steer(SITE, torch.ones(31)), "width 32"),
        (steer(SITE, torch.ones(1, 32)), "one direction per row"),
        (ablate(SITE, torch.ones(31)), "width 32"),
        (clamp(SITE, torch.ones(31), 0.0), "width 32"),
        (patch(SITE, torch.ones(3, 2, 32)), "activation's shape"),
    ],
)
def test_hooks_that_do_not_fit_the_site_raise_when_they_meet_it(tiny, tokens, hook, message) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.run_with_hooks(tokens, fwd_hooks=[hook])


def test_unknown_site_raises_with_close_matches(model, tokens) -> None:
    with (
        pytest.raises(ValueError, match=r"unknown site.*close matches.*hook_resid_post"),
        attached(model, [record("blocks.1.hook_resid_pos", {})]),
    ):
        model(tokens)


def test_a_hook_that_never_fires_raises(model, tokens) -> None:
    with pytest.raises(HookNotFired, match=SITE), attached(model, [record(SITE, {})]):
        pass
    with pytest.raises(ValueError, match="selects none"), attached(model, [(lambda name: False, lambda activation, hook: None)]):
        pass


def test_hooks_are_gone_after_an_exception_which_is_not_masked(model, tokens) -> None:
    plain = model(tokens)
    with pytest.raises(KeyError, match="mine"), attached(model, [steer(SITE, torch.ones(32))]):
        raise KeyError("mine")
    assert torch.equal(model(tokens), plain)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_backward_hooks_are_counted_too(tiny, tokens) -> None:
    tiny.add_adapter()
    seen = []
    with tiny.hooks(bwd_hooks=[(SITE, lambda grad, hook: seen.append(grad.shape))]):
        tiny(tokens).sum().backward()
    assert seen == [torch.Size([3, 11, 32])]
    with pytest.raises(HookNotFired), tiny.hooks(bwd_hooks=[(SITE, lambda grad, hook: None)]):
        tiny(tokens)


def test_bf16_edits_are_computed_in_float32() -> None:
    activation, direction = torch.randn(2, 40, 512).bfloat16() * 30, torch.randn(512)
    unit = direction / direction.norm()
    for hook, left in ((ablate(SITE, direction), 0.0), (clamp(SITE, direction, -1.0, 1.0), 1.0)):
        edited = hook[1](activation, hook=HookPoint())
        assert edited.dtype == torch.bfloat16
        assert (edited.float() @ unit).abs().max() < left + 0.6 < (activation.float() @ unit).abs().max()  # 0.6: rounding of the result


def test_threads_do_not_see_each_others_step() -> None:
    import threading

    none = torch.zeros(1).long()
    now = Step(mask=torch.ones(1, 1, dtype=torch.bool), positions=none[None], is_prompt=True, rows=none, made=none)
    seen = []

    def other() -> None:
        try:
            current_step()
        except RuntimeError:
            seen.append("none")

    with step(now):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen == ["none"]


def test_step_is_known_only_inside_generate() -> None:
    with pytest.raises(RuntimeError, match="inside generate"):
        current_step()
    none = torch.zeros(1).long()
    now = Step(mask=torch.ones(1, 1, dtype=torch.bool), positions=none[None], is_prompt=True, rows=none, made=none)
    with step(now):
        assert current_step() is now
