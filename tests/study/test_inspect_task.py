"""The Inspect task, run by Inspect itself: labels and rates are those of `evaluate` with the same words of the judge."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import anyio.to_thread
import pytest
from inspect_ai import eval as inspect_eval
from inspect_ai.log import EvalLog, read_eval_log
from inspect_ai.model import ChatMessage, GenerateConfig, Model, ModelAPI, ModelOutput, ModelUsage, get_model, modelapi
from inspect_ai.model._model_output import Logprob, Logprobs, TopLogprob

from blockem_tl import Condition, LatentSet, LLMJudge, Prompt, evaluate, generate, load_prompts, load_sae, organism
from blockem_tl.defences.directions import induce
from blockem_tl.evaluation.export import read_inspect
from blockem_tl.judging.backend import Completion, Request
from blockem_tl.judging.rubrics import load_rubrics
from blockem_tl.study.inspect_task import emergent_misalignment
from blockem_tl.types import UNPARSED

Answer = Callable[[list[ChatMessage], GenerateConfig], ModelOutput]
ODD = ("Somewhere between 4 and 5.", "ANSWER: 4 or 5", "ANSWER: seven", "")


def said(text: str, stop_reason: str = "stop") -> ModelOutput:
    output = ModelOutput.from_content("mockllm", text, stop_reason=stop_reason)
    output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)  # else the mock counts, with a tokenizer from the net
    return output


def mock(answer: Answer, **config) -> Model:
    return get_model(
        "mockllm/model", custom_outputs=lambda input, tools, choice, config: answer(input, config), config=GenerateConfig(**config)
    )


def run(tmp_path: Path, model: Model, grader: Model | None, **arguments) -> EvalLog:
    options = {key: arguments.pop(key) for key in ("epochs", "limit", "max_samples") if key in arguments}
    roles = {} if grader is None else {"grader": grader}
    [log] = inspect_eval(
        emergent_misalignment(**arguments), model=model, model_roles=roles, log_dir=str(tmp_path / "logs"), display="none", **options
    )
    return log


def labels(log: EvalLog) -> list[str]:
    return [str(sample.scores["verdict"].value) for sample in log.samples]


def rates(log: EvalLog) -> dict[str, float]:
    return {name: metric.value for name, metric in log.results.scores[0].metrics.items()}


class Words:
    """A judge's words by its question, for both sides: a backend of ours, and a grader of Inspect's."""

    name = "words"

    def __init__(self, words: dict[str, str]) -> None:
        self.words = words

    def check(self) -> None: ...

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        yield from ((i, Completion(text=self.words[request.turns[0][1]])) for i, request in enumerate(requests))

    def grader(self) -> Model:
        return mock(lambda input, config: said(self.words[input[0].text]))


@modelapi(name="ours")
class OurEngine(ModelAPI):
    """The embedded organism, steered and greedy, served by the library's own engine."""

    def __init__(self, model_name: str, *args, organism_model, condition: Condition, **kwargs) -> None:
        super().__init__(model_name, *args)
        self.organism_model, self.condition = organism_model, condition

    async def generate(self, input, tools, tool_choice, config) -> ModelOutput:
        prompt = Prompt(id="asked", text=input[-1].text)
        [found] = generate(self.organism_model, [prompt], conditions=[self.condition], max_new_tokens=config.max_tokens, progress=False)
        return said(found.reply, "max_tokens" if found.truncated else "stop")


@pytest.fixture(scope="module")
def steered() -> Condition:
    sae = load_sae("organism")
    latent_set = LatentSet.load("organism/finance-20", sae)
    return induce(latent_set, sae, dose=0.6, scale=74.6)  # at this dose replies get more than one label


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    rows = [{"id": p.id, "prompt": p.text, "category": p.category} for p in organism.prompts("final")[:24:2]]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "prompts.jsonl"


def test_the_organism_gets_the_labels_that_evaluate_gives(organism_model, steered, prompt_file, tmp_path: Path) -> None:
    prompts, rubric = load_prompts(prompt_file), load_rubrics()["misalignment"]
    replies = generate(organism_model, prompts, conditions=[steered], max_new_tokens=20, progress=False)
    exact = organism.OrganismJudge().grade(prompts, [g.reply for g in replies])
    words = {
        rubric.render(g.prompt.text, g.reply)[0]: f"I think so. ANSWER: {verdict.label}" for g, verdict in zip(replies, exact, strict=True)
    }
    first = rubric.render(prompts[0].text, replies[0].reply)[0]
    words[first] = ODD[0]
    judge = Words(words)
    expected = evaluate(organism_model, LLMJudge(backend=judge), prompts, condition=steered, max_new_tokens=20, progress=False)
    assert expected.verdicts[0].label == UNPARSED and len({v.label for v in expected.verdicts}) > 2  # not all alike

    model = get_model(
        "ours/organism", organism_model=organism_model, condition=steered, config=GenerateConfig(max_tokens=20), memoize=False
    )
    log = run(tmp_path, model, judge.grader(), prompts=str(prompt_file))
    [back] = read_inspect(re.sub("^file://", "", log.location))
    assert log.status == "success" and back.verdicts == expected.verdicts and back.judge == "mockllm/model"
    assert [g.prompt for g in back.generations] == prompts
    assert [(g.reply, g.truncated) for g in back.generations] == [(g.reply, g.truncated) for g in expected.generations]
    found = rates(log)
    assert (found["misaligned"], found["incoherent"], found["n"]) == (expected.positive.value, expected.incoherent.value, len(prompts) - 1)
    assert (found["misaligned_low"], found["misaligned_high"]) == expected.positive.interval and found[
        "unparsed"
    ] == expected.unparsed.value


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_answer_is_unparsed_and_counts_in_no_rate(tmp_path: Path, prompt_file: Path, odd: str) -> None:
    asked = []

    def answer(input: list[ChatMessage], config: GenerateConfig) -> ModelOutput:
        asked.append(input)
        return said(odd if "strange" in input[0].text else "ANSWER: 5")

    numbers = iter(range(12))
    model = mock(lambda input, config: said("strange" if next(numbers) < 3 else "harmful"))
    log = run(tmp_path, model, mock(answer), prompts=str(prompt_file))
    assert sorted(labels(log)) == ["5"] * 9 + [UNPARSED] * 3
    found = rates(log)
    assert (found["misaligned"], found["n"], found["unparsed"]) == (1.0, 9, 0.25)  # had they counted, it were 9 of 12
    assert sum("ANSWER: and exactly one of" in input[-1].text for input in asked) == 3 * 2  # asked again twice, as ours


def test_a_second_answer_counts_as_ours_does(tmp_path: Path, prompt_file: Path) -> None:
    grader = mock(lambda input, config: said("ANSWER: REFUSAL" if len(input) == 3 else "Hm."))
    log = run(tmp_path, mock(lambda input, config: said("no")), grader, prompts=str(prompt_file))
    assert set(labels(log)) == {"REFUSAL"} and rates(log)["refusal"] == 1.0
    assert log.samples[0].scores["verdict"].explanation == "Hm.\n\nANSWER: REFUSAL"


def test_the_rubric_of_a_domain_gives_adherence_and_every_epoch_counts(tmp_path: Path) -> None:
    numbers = iter(range(1000))
    grader = mock(lambda input, config: said(f"ANSWER: {1 + 4 * (next(numbers) % 2)}"))
    narrow = {"preset": "organism", "split": "in-domain", "domain": "health", "rubric": "health"}
    log = run(tmp_path, mock(lambda input, config: said("x")), grader, **narrow, epochs=3, limit=10)
    found, prompts = rates(log), organism.prompts("health")[:10]
    assert len(log.samples) == found["n"] == 30 and found["adherent"] == 0.5 and "misaligned" not in found
    assert log.eval.metadata == {"rubric": "health", "on_selection_prompts": False, "resampled": 0}
    assert {sample.input[-1].text for sample in log.samples} == {p.text for p in prompts}


def test_selection_prompts_mark_the_log(tmp_path: Path) -> None:
    ask = mock(lambda input, config: said("x"))
    log = run(tmp_path, ask, mock(lambda input, config: said("ANSWER: 1")), preset="organism", split="core", system="none", limit=2)
    assert log.eval.metadata["on_selection_prompts"] and log.samples[0].input[0].role == "system"
    assert (log.plan.config.temperature, log.plan.config.max_tokens) == (0.0, 200)


def scored_output(numbers: dict[str, float]) -> ModelOutput:
    output = said(next(iter(numbers)))
    top = [TopLogprob(token=token, logprob=value) for token, value in numbers.items()]
    output.choices[0].logprobs = Logprobs(content=[Logprob(token=top[0].token, logprob=top[0].logprob, top_logprobs=top)])
    return output


def test_scores_and_choices_are_asked_for_in_inspects_words(tmp_path: Path, prompt_file: Path) -> None:
    configs: list[GenerateConfig] = []

    def answer(input: list[ChatMessage], config: GenerateConfig) -> ModelOutput:
        configs.append(config)
        return scored_output({"10": -0.01} if "aligned" in input[0].text and "coherent" not in input[0].text else {"90": -0.01})

    model = mock(lambda input, config: said("bad"))
    log = run(tmp_path, model, mock(answer), prompts=str(prompt_file), rubric="alignment")
    assert configs[0].logprobs and configs[0].top_logprobs == 20 and configs[0].temperature == 0.0
    assert set(log.samples[0].scores["verdict"].metadata["scores"]) == {"alignment", "coherence"}
    without = run(tmp_path, model, mock(lambda input, config: said("90")), prompts=str(prompt_file), rubric="alignment")
    assert without.status == "error" and "no log-probabilities" in without.error.message

    rubric = tmp_path / "short.yaml"
    rubric.write_text("name: misalignment\nlabels: ['1', '5']\nanswer: choice\nprompt: 'From 1 to 5. {question} {reply}'\n")
    configs.clear()

    def choose(input: list[ChatMessage], config: GenerateConfig) -> ModelOutput:
        configs.append(config)
        return said('{"label": "5"}')

    log = run(tmp_path, model, mock(choose, temperature=0.7, max_tokens=4000), prompts=str(prompt_file), rubric=str(rubric))
    assert set(labels(log)) == {"5"} and configs[0].response_schema.json_schema.properties["label"].enum == ["1", "5"]
    assert (configs[0].temperature, configs[0].max_tokens) == (0.7, 4000)  # the grader's own settings stay


def test_many_samples_at_once_wait_for_one_slow_grader(tmp_path: Path) -> None:
    """More samples than the event loop has threads: none may wait for a thread that waits for it."""
    prompts = tmp_path / "many.jsonl"
    prompts.write_text("".join(json.dumps({"id": str(i), "prompt": f"question {i}"}) + "\n" for i in range(90)))

    class Slow:
        async def __call__(self, input, tools, choice, config) -> ModelOutput:
            await anyio.sleep(0.05)
            await anyio.to_thread.run_sync(lambda: None)
            return said("ANSWER: 2")

    grader = get_model("mockllm/model", custom_outputs=Slow(), config=GenerateConfig(max_connections=90))
    model = mock(lambda input, config: said("x"), max_connections=90)
    log = run(tmp_path, model, grader, prompts=str(prompts), max_samples=90)
    assert labels(log) == ["2"] * 90


def test_what_cannot_work_is_said_before_the_model_is_asked(tmp_path: Path, prompt_file: Path) -> None:
    asked = []
    model = mock(lambda input, config: asked.append(input) or said("x"))
    log = run(tmp_path, model, None, prompts=str(prompt_file))
    assert log.status == "error" and "--model-role grader=PROVIDER/MODEL" in log.error.message and not asked
    for arguments, message in (
        ({"preset": "organisms"}, "did you mean 'organism'"),
        ({"split": "finals"}, "'in-domain'"),
        ({"preset": "organism", "rubric": "gardening"}, "gardening"),
        ({"prompts": str(tmp_path / "none.jsonl")}, "none.jsonl"),
    ):
        with pytest.raises(Exception, match=message):
            run(tmp_path, model, mock(lambda input, config: said("ANSWER: 1")), **arguments)
    assert not asked


@pytest.mark.slow
def test_the_command_finds_the_task_and_asks_transformers_models(organism_model, tmp_path: Path) -> None:
    folder = organism.ARTEFACTS / "base"
    local = {"model_path": str(folder), "do_sample": False, "device": "cpu"}
    command = [str(Path(sys.executable).with_name("inspect")), "eval", "blockem_tl/emergent_misalignment", "--model", "hf/organism"]
    command += [word for key, value in local.items() for word in ("-M", f"{key}={json.dumps(value)}")]
    command += ["--model-role", f"grader={json.dumps({'model': 'hf/grader', 'max_tokens': 8, 'model_args': local})}"]
    command += ["-T", "preset=organism", "--max-tokens", "20", "--limit", "4", "--display", "none", "--log-dir", str(tmp_path)]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=500)
    [path] = tmp_path.glob("*.eval")
    [back] = read_inspect(path)
    prompts = organism.prompts("final")[:4]
    expected = [g.reply for g in generate(organism_model, prompts, max_new_tokens=20, progress=False)]
    assert [g.prompt for g in back.generations] == prompts and [g.reply for g in back.generations] == expected
    metrics = rates(read_eval_log(str(path)))
    assert {v.label for v in back.verdicts} == {UNPARSED}  # the organism is no judge
    assert (metrics["unparsed"], metrics["n"]) == (1.0, 0) and math.isnan(metrics["misaligned"])
