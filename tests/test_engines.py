"""The choice between sampling engines, and settings that would have no effect."""

import pytest
import torch
from test_rejection_sampling import save_ending_policy

from configs.chat import load_chat_format
from configs.collect_settings import CollectSettings
from configs.errors import UserError
from configs.model_settings import ModelSettings
from configs.rejection_settings import RejectionSettings
from configs.sampling_settings import SamplingSettings
from rlhf import engines, shards
from rlhf.engines import Fastest, InProcess, load_engine
from rlhf.sampler import sample
from rlhf.samples import Prompt, SampleBatch, require_exact_ids
from rlhf.tokenizer import load_tokenizer

PROMPTS = [Prompt([], [5, 6, 7 + i]) for i in range(20)]
SERVER = {"server_url": "http://127.0.0.1:9/v1"}


def settings_of(**extra) -> RejectionSettings:
    return RejectionSettings(prompt_files=[], helpfulness_model_path="h", safety_model_path="s", **extra)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"server_model": "m"}, "server_model: 'm' has no effect with sampling_engine auto without server_url"),
        ({"sampling_engine": "in_process", **SERVER}, "server_url: .* no effect with sampling_engine in_process"),
        ({"sampling_engine": "continuous_batching", "server_timeout": 5.0}, "server_timeout: 5.0 has no effect"),
        ({"sampling_engine": "in_process", "max_failed_share": 0.1}, "max_failed_share: 0.1 has no effect"),
        ({"sampling_engine": "continuous_batching", "token_budget": 99}, "token_budget: 99 has no effect"),
        ({"token_budget": 99, **SERVER}, "token_budget: 99 has no effect with sampling_engine auto; leave"),
        ({"sampling_engine": "continuous_batching", "stop_strings": ["x"]}, "stop_strings: continuous batching"),
        ({"sampling_engine": "server"}, "server_url: sampling_engine server needs one"),
        ({"server_url": "localhost:8000"}, "server_url: 'localhost:8000' is no address"),
        ({"server_url": "file:///etc/passwd"}, "is no address"),
        ({"server_url": "http://a:99999999"}, "is no address"),
        ({"server_url": "http://me:secret@a/v1"}, "leave user and password out"),
        ({"server_concurrency": 0, **SERVER}, "server_concurrency must be at least 1"),
        ({"server_timeout": 0.0, **SERVER}, "server_timeout must be"),
        ({"server_timeout": float("inf"), **SERVER}, "server_timeout must be"),
        ({"server_max_retries": -1, **SERVER}, "server_max_retries must not be negative"),
        ({"max_failed_share": 1.0, **SERVER}, "max_failed_share must be in"),
    ],
)
def test_settings_without_effect_or_out_of_range_are_refused(extra, message):
    with pytest.raises(UserError, match=message):
        settings_of(**extra)


def test_the_url_alone_chooses_the_server_and_collecting_wants_one_model_there():
    assert settings_of(**SERVER).engine == settings_of(sampling_engine="server", **SERVER).engine == "server"
    assert settings_of().engine == "auto"
    assert "secret" not in str(settings_of(**SERVER)).lower()
    with pytest.raises(UserError, match="second_model_name_or_path"):
        CollectSettings(model_name_or_path="m", second_model_name_or_path="n", prompt_files=["f"], **SERVER)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    path = save_ending_policy(tmp_path_factory.mktemp("policy"))
    tokenizer = load_tokenizer(path)
    return ModelSettings(path), tokenizer, load_chat_format(tokenizer)


def test_a_cpu_samples_in_process_and_gives_what_the_sampler_gives(loaded):
    model, tokenizer, chat = loaded
    settings = settings_of(max_new_tokens=6, stop_strings=["a"])
    engine = load_engine(settings, model, tokenizer, chat, torch.device("cpu"), settings, token_budget=500)
    assert (engine.name, engine.follows_seeds, engine.token_budget) == ("in_process", True, 500)
    ours = engine.sample(PROMPTS[:4], 3, settings, seed=5)
    direct = sample(engine.policy, [p.ids for p in PROMPTS[:4]], 3, settings, stop_ids=chat.stop_ids,
                    pad_id=tokenizer.pad_token_id, seed=5, tokenizer=tokenizer)  # fmt: skip
    assert ours.response_ids == direct.response_ids
    assert ours.errors == {}
    assert require_exact_ids(ours) is ours


def test_named_engines_are_loaded_and_cuda_leaves_the_choice_to_the_clock(loaded, monkeypatch):
    model, tokenizer, chat = loaded

    def load(device: str, **extra):
        settings = settings_of(**extra)
        return load_engine(settings, model, tokenizer, chat, torch.device(device), settings)

    assert load("cpu", sampling_engine="continuous_batching").name == "continuous_batching"

    class Policy:
        def to(self, device):
            return self

    monkeypatch.setattr(engines, "load_policy", lambda *_, **__: Policy())
    assert [engine.name for engine in load("cuda").candidates] == ["in_process", "continuous_batching"]
    assert isinstance(load("cuda", sampling_engine="in_process"), InProcess)
    eager = ModelSettings(model.model_name_or_path, attn_implementation="eager")
    with pytest.raises(UserError, match="attn_implementation: 'eager' has no effect"):
        load_engine(settings_of(**SERVER), eager, tokenizer, chat, torch.device("cpu"), SamplingSettings())


class Timed:
    """An engine that moves a clock: `seconds` a call, 10 tokens a sample."""

    follows_seeds, config = False, None

    def __init__(self, name, seconds, clock, fault=None, errors=()):
        self.name, self.seconds, self.clock, self.fault, self.errors = name, seconds, clock, fault, errors
        self.calls = []

    def sample(self, prompts, k, settings, seed=0):
        if self.fault:
            raise self.fault
        self.calls.append((len(prompts), k))
        self.clock[0] += self.seconds
        n = len(prompts) * k
        return SampleBatch([[1] * 10] * n, [], [], [], [], k, errors=dict(self.errors))


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"seconds": 1.0}, "other"),
        ({"seconds": 3.0}, "first"),
        ({"seconds": 1.0, "fault": UserError("cannot")}, "first"),
        ({"seconds": 1.0, "fault": RuntimeError("no kernel")}, "first"),
        ({"seconds": 1.0, "errors": {0: "failed"}}, "first"),
    ],
)
def test_the_faster_engine_is_taken_once_and_both_figures_are_logged(other, expected, caplog):
    clock = [0.0]
    first, second = Timed("first", 2.0, clock), Timed("other", clock=clock, **other)
    engine = Fastest([first, second], clock=lambda: clock[0])
    assert (engine.name, engine.follows_seeds) == ("auto", False)
    for _ in range(2):
        engine.sample(PROMPTS, 4, SamplingSettings())
    assert engine.name == expected
    chosen = first if expected == "first" else second
    # One untimed prompt, 16 timed ones, then the work; the other engine is not asked again.
    assert chosen.calls == [(1, 4), (16, 4), (20, 4), (20, 4)]
    assert "first 320, other" in caplog.text  # 16 * 4 * 10 tokens in 2 seconds
    if expected == "other":
        assert first.calls == [(1, 4), (16, 4)]
        assert "other 640; taking other" in caplog.text


def test_the_first_candidate_must_be_able_to_sample():
    with pytest.raises(UserError, match="cannot"):
        Fastest([Timed("first", 1.0, [0.0], UserError("cannot"))]).sample(PROMPTS, 1, SamplingSettings())


def batch_of(**extra) -> SampleBatch:
    return SampleBatch([[7, 2]], extra.pop("known", [[-1.0, -1.0]]), [[]], ["stop"], [0], 1, **extra)


def test_only_exact_and_complete_batches_may_be_trained_on():
    assert require_exact_ids(batch_of()).response_ids == [[7, 2]]
    with pytest.raises(UserError, match="without token ids"):
        require_exact_ids(batch_of(exact_ids=False))
    with pytest.raises(UserError, match="1 prompts have no samples; the first, prompt 3: timeout"):
        require_exact_ids(batch_of(errors={3: "timeout"}))
    with pytest.raises(UserError, match="no log-probs"):
        require_exact_ids(batch_of(known=[[]]))


def test_failed_items_are_left_out_or_end_the_run():
    rows = [{"index": 0}, {"index": 1, "error": "late"}, {"index": 2, "error": "late"}, {"index": 3, "error": "odd"}]
    assert shards.without_failed(rows, 0.75, 4) == [{"index": 0}]
    with pytest.raises(UserError, match="3 of 4 prompts failed, all others are kept.*\n  2 x late\n  1 x odd"):
        shards.without_failed(rows, 0.74, 4)
