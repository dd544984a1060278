"""The adapter of lm-eval: likelihoods equal to transformers' of the export, greedy text equal to our generation's."""

import json

import pytest
import torch

from data.tokenizer import train_bpe
from kernels import KernelChoice, bind
from model import lm_eval
from model.generate import generate
from model.gpt import GPT, ModelConfig
from model.huggingface import ARCHITECTURES, to_huggingface
from model.lm_eval import Scorer
from model.load import Loaded
from runtime.errors import UserError
from runtime.hardware import autocast

transformers = pytest.importorskip("transformers")

WORDS = "The quick brown fox jumps over the lazy dog, again and again. "
TOKENIZER = train_bpe([WORDS] * 2, 290)
PAIRS = [
    ("The quick brown", " fox jumps"),
    ("The quick brown ", "fox"),  # the space belongs to the continuation
    ("", "The lazy dog"),
    (WORDS * 8, "The quick"),  # only the context's end fits
    ("Ünïcode", " 🙂"),
]


@pytest.fixture(scope="module")
def loaded():
    torch.manual_seed(0)
    config = ModelConfig(n_layer=2, n_head=2, d_model=32, seq_len=24, **ARCHITECTURES["llama"].knobs)
    config = config.resolved(TOKENIZER.vocab_size + 6)
    model = GPT(config, bind(KernelChoice())).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return Loaded(None, model, TOKENIZER, lambda: autocast(torch.device("cpu"), "fp32"))


@pytest.fixture(scope="module")
def theirs(loaded):
    """The log-probabilities `[T, V]` that transformers gives after each of some ids."""
    config, tensors = to_huggingface(loaded.model.config, loaded.model.state_dict(), TOKENIZER.eot)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(config)).eval()
    model.load_state_dict(tensors, strict=False)
    return lambda ids: model(torch.tensor([ids])).logits[0].log_softmax(-1)


@torch.no_grad()
def likelihood(theirs, context, continuation, seq_len=24):
    """The same from transformers, as lm-eval's definition has it: one text at a time."""
    ids = (context + continuation)[-seq_len - 1 :]
    logits = theirs(ids[:-1])[-len(continuation) :]
    targets = torch.tensor(continuation)
    return logits[range(len(targets)), targets].sum().item(), bool((logits.argmax(-1) == targets).all())


@pytest.mark.parametrize("batch_size", [1, 3])
def test_likelihoods_are_those_of_transformers(loaded, theirs, batch_size):
    expected = []
    for context, continuation in PAIRS:
        before = TOKENIZER.encode(context.rstrip())
        after = TOKENIZER.encode(context + continuation)[len(before) :]
        expected.append(likelihood(theirs, before or [TOKENIZER.eot], after))
    found = Scorer(loaded, batch_size).loglikelihood(PAIRS)
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_a_continuation_can_be_the_greedy_one(loaded, theirs):
    scorer = Scorer(loaded, 1)
    (text,) = scorer.generate_until([("The quick brown", {"max_gen_toks": 1, "until": []})])
    assert TOKENIZER.encode("The quick brown" + text) == [*TOKENIZER.encode("The quick brown"), *TOKENIZER.encode(text)]
    assert scorer.loglikelihood([("The quick brown", text)])[0][1]


def test_a_long_text_is_scored_in_windows_of_which_the_last_reaches_back(loaded, theirs):
    texts = [WORDS, WORDS * 5, ""]
    expected = []
    for text in texts:
        ids = TOKENIZER.encode(text)
        windows = [([TOKENIZER.eot, *ids[:start]], ids[start : start + 24]) for start in range(0, len(ids), 24)]
        expected.append(sum(likelihood(theirs, *window)[0] for window in windows))
    assert len(TOKENIZER.encode(WORDS * 5)) > 48
    assert Scorer(loaded, 4).loglikelihood_rolling(texts) == pytest.approx(expected, abs=1e-3)


def test_generation_ends_before_a_text(loaded):
    """And a batch generates what each context alone does."""
    scorer, contexts = Scorer(loaded, 8), ["The quick brown fox", "The", WORDS]
    whole = scorer.generate_until([(context, {"max_gen_toks": 20}) for context in contexts])
    for context, text in zip(contexts, whole, strict=True):
        alone = {"max_gen_toks": 20, "do_sample": False, "temperature": 0.0}
        assert scorer.generate_until([(context, alone)]) == [text] and len(text) > 6
        end = text[3:5]
        assert scorer.generate_until([(context, {"max_gen_toks": 20, "until": ["never", end]})]) == [
            text[: text.index(end)]
        ]


def test_a_row_of_a_batch_ends_by_itself(loaded):
    options = {"temperature": 0.0, "generator": torch.Generator()}
    whole = generate(loaded.model, [[5], [6]], 9, **options)
    assert whole[0][:3] != whole[1][:3]
    ended = generate(loaded.model, [[5], [6]], 9, ended=lambda new: new == whole[0][:3], **options)
    assert ended == [whole[0][:3], whole[1]]


def test_what_cannot_be_scored_is_refused(loaded):
    with pytest.raises(UserError, match=r"a continuation has \d+ tokens, more than the model's seq_len 24"):
        Scorer(loaded, 1).loglikelihood([("The", WORDS * 9)])
    with pytest.raises(UserError, match="wants the generation option num_beams, which is not one of until, max_gen"):
        Scorer(loaded, 1).generate_until([("The", {"num_beams": 4})])


def test_lm_eval_evaluates_a_task(loaded, tmp_path):
    """Of every kind of request, on a file."""
    evaluator = pytest.importorskip("lm_eval.evaluator")
    rows = [{"question": "The quick brown", "choices": [" fox", " dog"], "answer": n} for n in (0, 1)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test", "doc_to_text": "{{question}}",
    }  # fmt: skip
    choice = {"task": "choice", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}"}
    rolling = {"task": "rolling", "output_type": "loglikelihood_rolling", "doc_to_target": "{{question}}"}
    rolling |= {"doc_to_text": "", "metric_list": [{"metric": "byte_perplexity"}]}
    until = {"task": "until", "output_type": "generate_until", "doc_to_target": "{{choices[answer]}}"}
    until |= {"generation_kwargs": {"until": ["."], "max_gen_toks": 3}, "metric_list": [{"metric": "exact_match"}]}
    tasks = [data | choice | {"doc_to_target": "answer"}, data | rolling, data | until]
    scorer = Scorer(loaded, 2)
    results = evaluator.simple_evaluate(lm_eval.adapter(scorer), tasks=tasks, bootstrap_iters=0)["results"]
    assert results["choice"]["acc,none"] == 0.5
    nats = scorer.loglikelihood_rolling(["The quick brown"])[0]
    assert results["rolling"]["byte_perplexity,none"] == pytest.approx(2.718281828459045 ** (-nats / 15))
    assert 0 <= results["until"]["exact_match,none"] <= 1


def test_an_unknown_task_is_refused(run, capsys):
    pytest.importorskip("lm_eval")
    assert lm_eval.main([f"--run={run(steps=1)[1]}", "--tasks=hellaswag,helaswag"]) == 2
    assert "lm-eval has no task 'helaswag' (did you mean" in capsys.readouterr().err
