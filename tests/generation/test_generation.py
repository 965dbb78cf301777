"""Batched replies equal replies made alone, and equal plain transformers with a forward hook, token for token."""

from types import SimpleNamespace

import pytest
import torch

from blockem_tl import (
    Condition,
    Prompt,
    Steering,
    TransformerLensEngine,
    current_step,
    generate,
    generate_stream,
    load_engine,
    record,
    steer,
)
from blockem_tl.generation.engine import Engine
from blockem_tl.generation.steering import UNSTEERED
from blockem_tl.models import memory

SITE, LATER = "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"
PROMPTS = [Prompt(id=str(n), text=" ".join(f"w{(7 * n + i) % 57}" for i in range(n))) for n in (1, 4, 2, 9, 5)]


@pytest.fixture
def directions():
    return torch.nn.functional.normalize(torch.randn(3, 32, generator=torch.Generator().manual_seed(5)), dim=-1)


@pytest.fixture
def conditions(directions):
    return [
        UNSTEERED,
        Condition(name="up", steering=(Steering(site=SITE, direction=directions[0], dose=1.5, scale=4.0),)),
        Condition(name="down", steering=(Steering(site=SITE, direction=directions[1], dose=-2.0, scale=4.0),)),
        Condition(name="later", steering=(Steering(site=LATER, direction=directions[2], dose=1.0, scale=6.0),)),
        Condition(name="zero", steering=(Steering(site=LATER, direction=directions[2], dose=0.0, scale=6.0),)),
    ]


@pytest.fixture
def eager_ends(tiny):
    """Let many tokens end a reply, so that rows leave the batch at different steps."""
    tiny.original_model.generation_config.eos_token_id = [2, *range(7, 17)]
    return tiny


def replies(generations):
    return [(g.condition, g.prompt.id, g.reply_ids, g.truncated) for g in generations]


def test_batched_equals_one_by_one(eager_ends, conditions) -> None:
    options = {"max_new_tokens": 12, "progress": False}
    together = replies(generate(eager_ends, PROMPTS, conditions=conditions, batch_size=11, **options))
    alone = [r for c in conditions for p in PROMPTS for r in replies(generate(eager_ends, [p], conditions=[c], batch_size=1, **options))]
    assert together == alone
    assert len({len(ids) for _, _, ids, _ in together}) > 3 and {t for *_, t in together} == {True, False}  # it was a real mixture
    by_name = {name: [r[2] for r in together if r[0] == name] for name in ("unsteered", "up", "down", "later", "zero")}
    assert by_name["zero"] == by_name["unsteered"]
    assert all(by_name[name] != by_name["unsteered"] for name in ("up", "down", "later"))


def test_steered_replies_equal_transformers_with_a_forward_hook(tiny, plain, conditions) -> None:
    for condition in conditions:
        handle = None
        for steering in condition.steering:
            layer, vector = {SITE: 1, LATER: 2}[steering.site], steering.vector
            handle = plain.model.layers[layer].register_forward_hook(lambda module, args, out, v=vector: out + v)
        for generation in generate(tiny, PROMPTS, conditions=[condition], max_new_tokens=8, progress=False):
            ids = tiny.tokenizer.apply_chat_template(
                [{"role": "user", "content": generation.prompt.text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
            expected = plain.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
            assert list(generation.reply_ids) == [t for t in expected if t != 2]
        if handle is not None:
            handle.remove()


def test_sampling_depends_on_the_seed_and_not_on_the_batch(eager_ends, conditions) -> None:
    def sampled(**options):
        return replies(generate(eager_ends, PROMPTS, conditions=conditions, max_new_tokens=6, temperature=1.0, progress=False, **options))

    assert sampled(seed=1, batch_size=25) == sampled(seed=1, batch_size=4)
    assert sampled(seed=1) != sampled(seed=2)


def test_sampling_follows_the_models_distribution(tiny) -> None:
    copies = [Prompt(id=str(i), text="w1 w2") for i in range(1)]
    many = [Condition(name=str(i)) for i in range(2000)]
    first = torch.tensor(
        [
            g.reply_ids[0] if g.reply_ids else 2
            for g in generate(tiny, copies, conditions=many, max_new_tokens=1, temperature=1.0, batch_size=2000, progress=False)
        ]
    )
    ids = torch.tensor([[1, 5, 8, 9, 6]])
    expected = tiny(ids)[0, -1].softmax(-1)
    observed = torch.bincount(first, minlength=64) / 2000
    assert (observed - expected).abs().max() < 0.04 < expected.max()


def test_base_and_tuned_are_told_apart(tiny) -> None:
    from shared import perturb

    tiny.add_adapter()
    perturb(tiny, "default")
    tuned = replies(generate(tiny, PROMPTS, max_new_tokens=6, progress=False))
    with tiny.using("base"):
        base = replies(generate(tiny, PROMPTS, max_new_tokens=6, progress=False))
    tiny.remove_adapter("default")
    assert replies(generate(tiny, PROMPTS, max_new_tokens=6, progress=False)) == base != tuned


def test_user_hooks_see_tokens_positions_and_roles(tiny) -> None:
    seen = []

    def watch(activation, hook):
        now = current_step()
        seen.append((now.is_prompt, now.positions[now.mask].tolist(), now.rows.tolist()))

    generate(tiny, PROMPTS[1:3], hooks=[(SITE, watch)], max_new_tokens=3, progress=False)
    lengths = [len(p.text.split()) + 3 for p in (PROMPTS[2], PROMPTS[1])]
    assert seen[0] == (True, [*range(lengths[0]), *range(lengths[1])], [1, 0])  # the shorter prompt goes first
    assert seen[1] == (False, lengths, [1, 0]) and len(seen) == 3


def test_constant_hooks_equal_conditions(tiny, directions) -> None:
    from_generator = (hook for hook in [steer(SITE, directions[0], 1.5, scale=4.0)])
    hooked = generate(tiny, PROMPTS, hooks=from_generator, batch_size=2, max_new_tokens=6, progress=False)
    condition = Condition(name="unsteered", steering=(Steering(site=SITE, direction=directions[0], dose=1.5, scale=4.0),))
    assert replies(hooked) == replies(generate(tiny, PROMPTS, conditions=[condition], max_new_tokens=6, progress=False))


def test_replies_at_the_token_limit_are_marked(tiny) -> None:
    assert all(g.truncated and len(g.reply_ids) == 2 for g in generate(tiny, PROMPTS[1:2], max_new_tokens=2, progress=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 90}, "shorten the prompt or max_new_tokens"),
        ({"conditions": []}, "at least one condition"),
        ({"conditions": [UNSTEERED, UNSTEERED]}, "distinct condition names"),
        (
            {"conditions": [Condition(name="x", steering=(Steering(site="blocks.1.hook_typo", direction=torch.ones(32), dose=1.0),))]},
            "unknown site",
        ),
        (
            {"conditions": [Condition(name="x", steering=(Steering(site=SITE, direction=torch.ones(31), dose=1.0),))]},
            "shape \\(32,\\).*got \\(31,\\)",
        ),
    ],
)
def test_bad_requests_are_refused_before_any_work(tiny, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        generate(tiny, PROMPTS, progress=False, **options)


def test_impossible_conditions_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        Steering(site=SITE, direction=torch.full((32,), float("nan")), dose=1.0)
    with pytest.raises(ValueError, match="finite"):
        Steering(site=SITE, direction=torch.ones(32), dose=float("inf"))
    twice = Steering(site=SITE, direction=torch.ones(32), dose=1.0)
    with pytest.raises(ValueError, match="each site once"):
        Condition(name="x", steering=(twice, twice))


def test_a_user_hook_at_a_gated_site_raises(tiny) -> None:
    with pytest.raises(ValueError, match="use_attn_result"):
        generate(tiny, PROMPTS, hooks=[record("blocks.1.attn.hook_result", {})], max_new_tokens=2, progress=False)


# ------------------------------------------------------------------------------------------------ the engine


def streamed(engine, conditions, **options):
    found = dict(engine.stream(PROMPTS, conditions=conditions, progress=False, **options))
    return [r for c in range(len(conditions)) for r in replies(found[c])]


def test_conditions_arrive_one_by_one_and_equal_generate(eager_ends, conditions) -> None:
    engine = TransformerLensEngine(eager_ends, batch_size=7)
    assert isinstance(engine, Engine) and engine.name == "transformer_lens"
    expected = replies(generate(eager_ends, PROMPTS, conditions=conditions, max_new_tokens=12, progress=False))
    assert streamed(engine, conditions, max_new_tokens=12) == expected
    stream = engine.stream(PROMPTS, conditions=conditions, max_new_tokens=12, progress=False)
    forwards = []
    eager_ends.add_hook(SITE, lambda activation, hook: forwards.append(len(activation)))
    first, _ = next(stream)
    early = len(forwards)
    rest = [c for c, _ in stream]
    assert sorted([first, *rest]) == [0, 1, 2, 3, 4]
    assert early < len(forwards) and max(forwards) <= 7


def test_each_condition_may_ask_its_own_part_of_the_prompts(eager_ends, conditions) -> None:
    engine = TransformerLensEngine(eager_ends, batch_size=3)
    whole = dict(engine.stream(PROMPTS, conditions=conditions, max_new_tokens=12, progress=False))
    parts = [[1], *([[2, 0]] * (len(conditions) - 1))]
    some = dict(engine.stream(PROMPTS, conditions=conditions, prompt_indices=parts, max_new_tokens=12, progress=False))
    assert some == {c: [whole[c][p] for p in part] for c, part in enumerate(parts)}
    for wrong in (parts[1:], [[], *parts[1:]], [[0, 0], *parts[1:]], [[len(PROMPTS)], *parts[1:]]):
        with pytest.raises(ValueError, match="prompt_indices: expected for each of"):
            engine.stream(PROMPTS, conditions=conditions, prompt_indices=wrong, progress=False)


def test_the_adapter_that_acts_is_chosen_and_the_model_left_as_it_was(tiny, conditions, tmp_path) -> None:
    from shared import perturb

    for seed, name in enumerate(("first", "second")):
        tiny.add_adapter(name)
        perturb(tiny, name, seed=seed)
    tiny.use_adapter("first")
    options = {"max_new_tokens": 6, "progress": False}
    expected = {"first": replies(generate(tiny, PROMPTS, conditions=conditions, **options))}
    with tiny.using("base"):
        expected["base"] = replies(generate(tiny, PROMPTS, conditions=conditions, **options))
    tiny.use_adapter("second")
    expected["second"] = replies(generate(tiny, PROMPTS, conditions=conditions, **options))
    assert expected["base"] != expected["first"] != expected["second"]
    engine = TransformerLensEngine(tiny, batch_size=4)
    trainable = [p.requires_grad for p in tiny.original_model.parameters()]
    for adapter, wanted in expected.items():
        assert streamed(engine, conditions, adapter=adapter, max_new_tokens=6) == wanted
        stream = engine.stream(PROMPTS, conditions=conditions, adapter=adapter, max_new_tokens=6, progress=False)
        next(stream)
        for _ in range(2):  # in the middle, and after an early end
            assert tiny.active_adapter == "second" and [p.requires_grad for p in tiny.original_model.parameters()] == trainable
            assert not any(point.fwd_hooks for point in tiny.hook_dict.values())
            stream.close()
    with pytest.raises(ValueError, match="unknown adapter 'third'.*'first', 'second'"):
        engine.stream(PROMPTS, adapter="third")
    folder = tiny.save_adapter(tmp_path / "saved", "first")
    assert streamed(engine, conditions, adapter=folder, max_new_tokens=6) == expected["first"] and tiny.adapters == ["first", "second"]
    assert streamed(engine, conditions, max_new_tokens=6) == expected["second"]  # None: the model as it stands
    with tiny.using("base"):
        assert streamed(engine, conditions, max_new_tokens=6) == expected["base"]
        assert streamed(engine, conditions, adapter="first", max_new_tokens=6) == expected["first"]
    assert replies(generate(tiny, PROMPTS, adapter="base", conditions=conditions, **options)) == expected["base"]


def test_an_engine_is_chosen_by_name(tiny, tiny_folder, tmp_path, monkeypatch) -> None:
    from shared import perturb

    tiny.add_adapter("x")
    perturb(tiny, "x")
    expected = replies(generate(tiny, PROMPTS, max_new_tokens=4, progress=False))
    folder = tiny.save_adapter(tmp_path / "adapter", "x")
    engine = load_engine("transformer_lens", model=tiny_folder, adapters={"mine": folder}, batch_size=3, device="cpu")
    assert streamed(engine, [UNSTEERED], adapter="mine", max_new_tokens=4) == expected
    assert streamed(engine, [UNSTEERED], adapter="base", max_new_tokens=4) != expected
    with pytest.raises(ValueError, match="unknown engine 'vlm'.*transformer_lens, vllm"):
        load_engine("vlm", model=tiny)
    with pytest.raises(ValueError, match="from disk.*save_adapter"):
        load_engine("vllm", model=tiny)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match='pip install "vllm'):
        load_engine("vllm", model=tiny_folder)


# ------------------------------------------------------------------------------------------------ refilling, limits, memory


def test_limits_per_prompt(tiny, conditions) -> None:
    limits = [3, 1, 7, 2, 5]
    long = replies(generate(tiny, PROMPTS, conditions=conditions, max_new_tokens=7, progress=False))
    short = replies(generate(tiny, PROMPTS, conditions=conditions, max_new_tokens=limits, batch_size=3, progress=False))
    assert [ids for _, _, ids, _ in short] == [ids[: limits[i % 5]] for i, (_, _, ids, _) in enumerate(long)]
    assert len({len(ids) for _, _, ids, _ in short}) > 3


def test_waiting_rows_take_the_places_of_finished_ones(tiny, conditions) -> None:
    def sizes(refill: bool) -> tuple[list[int], list]:
        seen = []
        tiny.add_hook(SITE, lambda activation, hook: seen.append(len(activation)))  # lasting: removed below
        engine = TransformerLensEngine(tiny, batch_size=5, refill=refill)
        found = streamed(engine, conditions, max_new_tokens=[2, 30, 2, 30, 2])
        tiny.reset_hooks()
        return seen, found

    (refilled, one), (waited, other) = sizes(True), sizes(False)
    assert one == other and len(refilled) < 0.8 * len(waited)
    assert max(refilled) <= 5 and max(waited) <= 5


@pytest.mark.parametrize("watched", ["no", "during", "always"])
def test_prompts_run_once_below_the_first_steered_block(tiny, conditions, watched) -> None:
    """Unless a hook of the user's might want to see them there."""
    generate(tiny, PROMPTS, conditions=conditions, max_new_tokens=1, progress=False)  # the first time, one token says how blocks return
    ran = {block: 0 for block in range(tiny.cfg.n_layers)}
    handles = [
        tiny.blocks[block].mlp.register_forward_pre_hook(lambda module, args, b=block: ran.update({b: ran[b] + len(args[0])}))
        for block in ran
    ]
    hook = (SITE, lambda activation, hook: None)
    if watched == "always":
        tiny.add_hook(*hook)
    hooks = [hook] if watched == "during" else []
    generate(tiny, PROMPTS, conditions=conditions, hooks=hooks, max_new_tokens=1, progress=False)
    for handle in handles:
        handle.remove()
    tiny.reset_hooks()
    n, rows, tried = len(PROMPTS), len(PROMPTS) * len(conditions), 1
    assert ran[1] == rows + tried and ran[0] == (n if watched == "no" else rows) + tried


def test_hooks_never_see_a_row_twice_or_one_that_has_finished(eager_ends, conditions) -> None:
    seen, chosen = dict[int, list[int]](), dict[int, list[int]]()

    def watch(activation, hook):
        now = current_step()
        assert now.mask.shape == now.positions.shape == activation.shape[:2] and len(set(now.rows.tolist())) == len(activation)
        for row, mask, positions in zip(now.rows.tolist(), now.mask, now.positions, strict=True):
            assert now.is_prompt == (row not in seen)
            seen.setdefault(row, []).extend(positions[mask].tolist())
        for row, made in zip(now.rows.tolist(), now.made.tolist(), strict=True):
            chosen.setdefault(row, []).append(made)

    found = generate(eager_ends, PROMPTS, conditions=conditions, hooks=[(SITE, watch)], max_new_tokens=12, batch_size=4, progress=False)
    for row, generation in enumerate(found):
        tokens = len(generation.prompt.text.split()) + 3 + len(generation.reply_ids) - generation.truncated  # the last is never run
        assert seen[row] == list(range(tokens))
        assert chosen[row] == list(range(len(generation.reply_ids) + (not generation.truncated)))  # the end token is chosen too


def test_a_row_that_overflows_leaves_nothing_behind(tiny, directions) -> None:
    loud = Condition(name="loud", steering=(Steering(site=SITE, direction=directions[0] * 3e38, dose=1.0, scale=1.0),))
    conditions = [loud, *(Condition(name=str(i)) for i in range(3))]
    alone = replies(generate(tiny, PROMPTS, conditions=conditions[1:], max_new_tokens=8, progress=False))
    assert replies(generate(tiny, PROMPTS, conditions=conditions, max_new_tokens=8, batch_size=5, progress=False))[5:] == alone


def test_a_sample_depends_on_nothing_else_that_is_asked(tiny, conditions) -> None:
    options = {"max_new_tokens": 6, "temperature": 1.0, "seed": 3, "progress": False}
    together = {r[:2]: r for r in replies(generate(tiny, PROMPTS, conditions=conditions, **options))}
    part = replies(generate(tiny, PROMPTS[2:4], conditions=conditions[3:], **options))
    assert part == [together[r[:2]] for r in part]


def exhausted_above(model, monkeypatch, rows: int) -> list[int]:
    """Make the model's forward run out of memory for more than ``rows`` rows; returns the sizes that were tried."""
    tried, forward = [], model.original_model.forward

    def scarce(*args, **kwargs):
        tried.append(len(kwargs["input_ids"]))
        if tried[-1] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.original_model, "forward", scarce)
    return tried


def test_out_of_memory_halves_the_batch_and_loses_nothing(eager_ends, conditions, monkeypatch) -> None:
    options = {"conditions": conditions, "max_new_tokens": 12, "progress": False}
    expected = replies(generate(eager_ends, PROMPTS, **options))
    tried = exhausted_above(eager_ends, monkeypatch, 5)
    with pytest.warns(UserWarning, match="out of memory with .* rows at once: going on with") as warned:
        found = list(generate_stream(eager_ends, PROMPTS, batch_size=20, **options))
    assert tried[:5] == [1, 5, 20, 5, 10] and max(tried[5:]) <= 5  # the site is tried; the five prompts run below it; rows join
    assert [str(w.message).split("with ")[-1].split()[0] for w in warned] == ["10", "5"]
    assert sorted(c for c, _ in found) == [0, 1, 2, 3, 4]
    assert [r for _, generations in sorted(found, key=lambda pair: pair[0]) for r in replies(generations)] == expected


def test_out_of_memory_while_others_run_begins_them_again(eager_ends, conditions, monkeypatch) -> None:
    options = {"conditions": conditions, "max_new_tokens": 12, "temperature": 1.0, "progress": False}
    expected = replies(generate(eager_ends, PROMPTS, **options))
    forward, calls = eager_ends.original_model.forward, []

    def once(*args, **kwargs):
        calls.append(1)
        if len(calls) == 9:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(*args, **kwargs)

    monkeypatch.setattr(eager_ends.original_model, "forward", once)
    with pytest.warns(UserWarning, match="going on with 4"):
        assert replies(generate(eager_ends, PROMPTS, batch_size=8, **options)) == expected


def test_when_not_one_row_fits_it_says_so_and_other_errors_pass(tiny, monkeypatch) -> None:
    exhausted_above(tiny, monkeypatch, 0)
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(MemoryError, match="not even one row of 20 tokens"):
        generate(tiny, PROMPTS, max_new_tokens=8, batch_size=4, progress=False)
    monkeypatch.setattr(tiny.original_model, "forward", lambda **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(tiny, PROMPTS, max_new_tokens=8, progress=False)
    assert not any(point.fwd_hooks for point in tiny.hook_dict.values())


def test_the_batch_is_what_fits_into_free_memory(tiny, monkeypatch) -> None:
    kv = 2 * 4 * 2 * 8 * 20 * 4  # keys and values x layers x heads x width x columns x float32
    assert kv < memory.row_bytes(tiny, 20) < 2 * kv + 1e5
    for rows in (1, 7, 50):
        free = rows * memory.row_bytes(tiny, 20) / memory.SHARE + 1
        monkeypatch.setattr(memory.psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert memory.rows_at_once(tiny, 20, most=256) == rows
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    assert memory.rows_at_once(tiny, 20, most=256) == 1  # the run itself says if that does not fit either
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=1e15))
    assert memory.rows_at_once(tiny, 20, most=256) == 256


def test_bad_limits_and_sites_are_refused_before_any_work(tiny, directions) -> None:
    def steered(site):
        return [Condition(name="x", steering=(Steering(site=site, direction=directions[0], dose=1.0),))]

    forwards = []
    tiny.add_hook("blocks.0.hook_resid_pre", lambda activation, hook: forwards.append(activation.shape[:2]))
    for options, message in [
        ({"max_new_tokens": [3, 4]}, r"one per prompt \(5\)"),
        ({"max_new_tokens": [3, 3, 0, 3, 3]}, "number >= 1"),
        ({"max_new_tokens": [3, 3, 3, 90, 3]}, "shorten the prompt"),
        ({"batch_size": 0}, "batch_size >= 1 or None"),
        ({"temperature": -1.0}, "temperature >= 0"),
        ({"conditions": steered("blocks.1.mlp.hook_post")}, r"cannot be steered.*\[batch pos 32\].*\(1, 1, 64\)"),
        ({"conditions": steered("blocks.1.hook_resid_mid")}, "would not reach the residual stream"),
        ({"conditions": steered("blocks.1.attn.hook_result")}, "use_attn_result"),
    ]:
        with pytest.raises(ValueError, match=message):
            generate_stream(tiny, PROMPTS, progress=False, **options)  # no need to begin it
    assert set(forwards) <= {(1, 1)}  # a site is tried on one token
