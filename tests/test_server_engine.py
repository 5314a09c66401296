"""Sampling from servers: a real `transformers serve` process, and a loopback server for what a real one rarely shows.

vLLM is not run here: the loopback server answers /v1/completions in its form, from its documentation.
"""

import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from loopback_server import Loopback, hang, listing, text_answer, token_ids_answer
from test_rejection_sampling import rows_of, save_ending_policy, stored
from tiny_models import prompt_rows, save_tiny_reward_model, tiny_config, tiny_tokenizer, write_rows
from transformers import LlamaForCausalLM

from configs.chat import load_chat_format
from configs.errors import UserError
from configs.rejection_settings import RejectionSettings
from configs.sampling_settings import SamplingSettings
from rlhf import collect_preferences, engines, rejection_sampling
from rlhf.models import save_policy
from rlhf.samples import Prompt
from rlhf.server_protocol import Choice, Garbage, encode_choice, read_choices
from rlhf.tokenizer import load_tokenizer

pytest.importorskip("openai", reason="the server extra is not installed")
from rlhf import server_engine  # noqa: E402

CHAT = load_chat_format(tiny_tokenizer())
WORDS = ["the cat", "a dog runs", "small house", "red tree"]
MESSAGES = [[{"role": "user", "content": text}] for text in WORDS]
PROMPTS = [Prompt(messages, CHAT.encode_prompt(messages)) for messages in MESSAGES]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(server_engine, "FIRST_WAIT", 0.01)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    for name in ("SAMPLING_SERVER_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def connect(url: str, sampling: SamplingSettings | None = None, **extra) -> server_engine.Server:
    extra = {"server_max_retries": 2, "server_timeout": 5.0} | extra
    settings = RejectionSettings(
        prompt_files=[], helpfulness_model_path="h", safety_model_path="s", server_url=url, **extra
    )
    config = tiny_config(len(CHAT.tokenizer))
    return server_engine.Server(settings, "policy", CHAT, config, sampling or SamplingSettings(max_new_tokens=8))


def ids_server(faults=lambda body, nth: None) -> Loopback:
    """Answers as vLLM does, but for the requests to which `faults` gives an answer of its own."""
    return Loopback(lambda path, body, nth: faults(body, nth) or token_ids_answer(body), listing("m"))


def failing_on(text: str, answer) -> Loopback:
    """`answer()` to every request whose prompt is `text`, ids to all others."""
    prompt = PROMPTS[WORDS.index(text)].ids
    return ids_server(lambda body, nth: answer() if body["prompt"] == prompt else None)


# ---- what is sent, and what comes back


def test_ids_and_log_probs_of_n_samples_a_request():
    server = ids_server()
    with server.running() as url:
        engine = connect(url)
        batch = engine.sample(PROMPTS, 3, SamplingSettings(max_new_tokens=8, stop_token_ids=[9]), seed=4)
        path, body = server.requests[1]
        assert (engine.model, engine.dialect, path, body["n"]) == ("m", "completions", "/v1/completions", 3)
        sent = {tuple(body["prompt"]) for _, body in server.requests[1:]}
        assert sent == {tuple(prompt.ids) for prompt in PROMPTS}
        assert len(server.requests) == 5, "one trial, then one request a prompt"
        # Neutral values are sent too: left out, they would come from the model's generation_config.json.
        neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        assert {name: body[name] for name in neutral} == neutral
        assert (body["stop_token_ids"], body["max_tokens"], body["return_token_ids"]) == ([9, 2], 8, True)
        # One seed for n samples would make some servers draw one sample n times.
        assert not any("seed" in body for _, body in server.requests)
        assert batch.response_ids == [[10, 20, 2], [11, 20, 2], [12, 20, 2]] * 4
        assert batch.logprobs == batch.model_logprobs == [[-0.5] * 3, [-1.5] * 3, [-2.5] * 3] * 4
        assert (batch.exact_ids, batch.errors, batch.finish_reasons) == (True, {}, ["stop"] * 12)
        # Which of its distributions a server reports is not known where they differ.
        tempered = engine.sample(PROMPTS, 2, SamplingSettings(temperature=0.7, max_new_tokens=8))
        assert tempered.logprobs == tempered.model_logprobs == [[]] * 8
        server.requests.clear()
        greedy = engine.sample(
            PROMPTS[:2], 2, SamplingSettings(temperature=0.0, max_new_tokens=8), seed=[5, 6, 7, 2**40]
        )
        assert not any("n" in body for _, body in server.requests), "vLLM refuses n for greedy samples"
        assert sorted(body["seed"] for _, body in server.requests) == [0, 5, 6, 7]  # 2^40 fits no server's range
        assert len(greedy) == 4


def test_a_server_without_n_is_found_out_once_and_asked_k_times():
    server = Loopback(lambda path, body, nth: token_ids_answer(body | {"n": 1}), listing("m", max_model_len=100))
    with server.running() as url:
        engine = connect(url)
        assert engine.config.max_position_embeddings == 100
        batch = engine.sample(PROMPTS, 3, SamplingSettings(max_new_tokens=8), seed=list(range(12)))
        assert (len(batch), batch.errors) == (12, {})
        assert [("n" in body) for _, body in server.requests] == [True] + [False] * 12
        assert sorted(body["seed"] for _, body in server.requests[1:]) == list(range(12))


def chat_only(text: str = "the cat", reason: str = "stop", known=("model", "messages", "temperature", "top_p",
              "max_tokens", "n", "seed", "stop"), prompt_tokens: int | None = None, **extra) -> Loopback:  # fmt: skip
    def answer(path, body, nth):
        if path != "/v1/chat/completions":
            return 404, {"detail": "Not Found"}
        if unknown := set(body) - set(known):
            return 422, {"detail": f"Unexpected fields {sorted(unknown)}"}
        status, value = text_answer(text, reason, **extra)
        return status, value | {"usage": {"prompt_tokens": prompt_tokens}}

    return Loopback(answer, (404, {}))


def test_text_is_encoded_once_with_the_stop_id_and_marked():
    with chat_only(" cat runs").running() as url:
        engine = connect(url)
        batch = engine.sample(PROMPTS[:1], 2, SamplingSettings(max_new_tokens=8))
        assert (engine.model, engine.dialect, engine.gives_n) == ("policy", "openai", False)
        text = CHAT.tokenizer.encode(" cat runs", add_special_tokens=False)
        assert batch.response_ids == [[*text, 2]] * 2
        assert (batch.exact_ids, batch.logprobs, batch.finish_reasons) == (False, [[], []], ["stop"] * 2)
        with pytest.raises(UserError, match="top_k: the server knows OpenAI's own fields only"):
            engine.sample(PROMPTS, 1, SamplingSettings(top_k=5))
    with chat_only(" cat runs", "length").running() as url:
        batch = connect(url).sample(PROMPTS[:1], 1, SamplingSettings(max_new_tokens=8))
        assert (batch.response_ids, batch.finish_reasons) == ([text], ["length"])


def test_another_chat_template_on_the_server_is_refused():
    trial = len(CHAT.encode_prompt(server_engine.TRIAL))
    with chat_only(prompt_tokens=trial).running() as url:
        connect(url)
    with (
        chat_only(prompt_tokens=trial + 5).running() as url,
        pytest.raises(UserError, match="its chat template is not"),
    ):
        connect(url)


def test_what_ended_a_text_is_put_back():
    def ids(text: str) -> list[int]:
        return CHAT.tokenizer.encode(text, add_special_tokens=False)

    def encoded(**choice) -> list[int]:
        return encode_choice(Choice(**choice), CHAT.tokenizer, [7, 2], ["END", "###"])

    assert encoded(text="cat", reason="stop") == [*ids("cat"), 2]
    assert encoded(text="cat", reason="stop", stopped_by=7) == [*ids("cat"), 7]
    assert encoded(text="cat", reason="stop", stopped_by="###") == ids("cat###")  # vLLM cuts the string off
    assert encoded(text="catEND", reason="stop") == ids("catEND")  # transformers leaves it in
    assert encoded(text="cat", reason="length") == ids("cat")
    assert encoded(text="", reason="stop") == [2]
    assert encoded(text="x", reason="stop", ids=[5, 6]) == [5, 6]
    assert encoded(text="x", reason="stop", ids=[5, 2], stopped_by=2) == [5, 2]
    assert encoded(text="x", reason="stop", ids=[5, 6], stopped_by=2) == [5, 6, 2]  # trimmed, but named
    assert encoded(text="x", reason="stop", ids=[5, 6], stopped_by="END") == [5, 6]


CHOICE = {"text": "a", "finish_reason": "stop", "token_ids": [5, 2]}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("text", "no choices"),
        ([], "no choices"),
        ({}, "no choices"),
        ({"choices": []}, "no choices"),
        ({"choices": {"0": 1}}, "no choices"),
        ({"choices": ["a"]}, "not an object"),
        ({"choices": [CHOICE | {"text": None}]}, "no text"),
        ({"choices": [CHOICE | {"finish_reason": None}]}, "neither stop nor length"),
        ({"choices": [CHOICE | {"finish_reason": "content_filter"}]}, "'content_filter' is neither"),
        ({"choices": [CHOICE | {"token_ids": []}]}, "0 token ids where 1 to 4"),
        ({"choices": [CHOICE | {"token_ids": [5] * 5}]}, "5 token ids where 1 to 4"),
        ({"choices": [CHOICE | {"token_ids": [5, 300]}]}, "outside of the policy's 300 tokens"),
        ({"choices": [CHOICE | {"token_ids": [-1]}]}, "outside"),
        ({"choices": [CHOICE | {"token_ids": "ab"}]}, "not integers"),
        ({"choices": [CHOICE | {"token_ids": [True]}]}, "not integers"),
        ({"choices": [CHOICE | {"logprobs": {"tokens": ["a"], "token_logprobs": [-1.0]}}]}, "1 log-probs for 2 tokens"),
        ({"choices": [CHOICE | {"logprobs": {"tokens": ["a"] * 2, "token_logprobs": [-1.0, float("nan")]}}]}, "finite"),
        ({"choices": [CHOICE | {"logprobs": {"tokens": ["a"] * 2, "token_logprobs": [-1.0, None]}}]}, "finite"),
        ({"choices": [{"text": "", "finish_reason": "length"}]}, "empty text"),
        ({"choices": [{"message": {"content": "a", "tool_calls": [1]}, "finish_reason": "stop"}]}, "such parsers"),
        ({"choices": [{"message": {"content": "a", "reasoning": "b"}, "finish_reason": "stop"}]}, "such parsers"),
    ],
)
def test_answers_that_are_no_samples_are_named(answer, message):
    with pytest.raises(Garbage, match=message):
        read_choices(answer, vocabulary=300, max_new_tokens=4)


def test_ids_are_read_from_token_names_and_from_chat_log_probs():
    named = {"text": "a", "finish_reason": "length", "logprobs": {"tokens": ["token_id:5"], "token_logprobs": [-1.0]}}
    chat = {"message": {"content": "a"}, "finish_reason": "length",
            "logprobs": {"content": [{"token": "token_id:5", "logprob": -1.0}]}}  # fmt: skip
    for choice in (named, chat):
        (read,) = read_choices({"choices": [choice]}, 300, 4)
        assert (read.ids, read.logprobs, read.reason) == ([5], [-1.0], "length")
    (plain,) = read_choices({"choices": [named | {"logprobs": {"tokens": ["a"], "token_logprobs": [-1.0]}}]}, 300, 4)
    assert plain.ids is None


# ---- failures


def test_errors_of_the_server_are_tried_again():
    refusals = itertools.cycle([(500, {"error": "busy"}), (503, {}), None])
    server = ids_server(lambda body, nth: next(refusals) if nth > 0 else None)
    with server.running() as url:
        batch = connect(url, server_concurrency=1).sample(PROMPTS, 2, SamplingSettings(max_new_tokens=8))
    assert (batch.errors, len(server.requests)) == ({}, 1 + 3 * 4)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda: (400, {"error": {"message": "too long\nfor me"}}), "status 400: too long for me"),
        (lambda: (500, b"x" * 1000), r"status 500: x+\.\.\.$"),
        (lambda: (200, b"<html>not JSON"), "the answer is not JSON"),
        (lambda: (200, {"choices": [CHOICE]}), "1 choices where 2 were asked for"),
        (lambda: hang(0.6), "no answer within server_timeout"),
        (lambda: (307, {}), "status 307"),
    ],
)
def test_a_prompt_that_fails_is_recorded_and_the_others_are_sampled(answer, reason):
    with failing_on("a dog runs", answer).running() as url:
        batch = connect(url, server_timeout=0.3, server_max_retries=1).sample(
            PROMPTS, 2, SamplingSettings(max_new_tokens=8)
        )
    assert list(batch.errors) == [1]
    assert re.search(reason, batch.errors[1]), batch.errors
    assert batch.response_ids == [[10, 20, 2], [11, 20, 2], [], [], *[[10, 20, 2], [11, 20, 2]] * 2]
    assert batch.finish_reasons[1:5] == ["stop", "error", "error", "stop"]


def test_requests_at_a_time_are_bounded():
    server = ids_server(lambda body, nth: time.sleep(0.05))
    with server.running() as url:
        connect(url, server_concurrency=3).sample(PROMPTS * 4, 1, SamplingSettings(max_new_tokens=8))
    assert server.most_at_once == 3


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_a_server_that_is_down_before_or_during_the_work_is_one_error():
    with pytest.raises(UserError, match=r"server_url: no server answers at http://127.0.0.1:\d+/v1 .*vllm serve"):
        connect(f"http://127.0.0.1:{free_port()}")
    with ids_server().running() as url:
        engine = connect(url)
    with pytest.raises(UserError, match="answers no more .*start it and run this again"):
        engine.sample(PROMPTS, 2, SamplingSettings(max_new_tokens=8))


def test_a_refused_key_or_model_is_one_error_that_names_the_fix(monkeypatch):
    for status in (401, 403):
        with Loopback(lambda *_: (200, {}), (status, {"error": {"message": "who?"}})).running() as url:
            with pytest.raises(UserError, match="wants a key: set SAMPLING_SERVER_API_KEY .*who"):
                connect(url)
            monkeypatch.setenv("SAMPLING_SERVER_API_KEY", "s3cret")
            with pytest.raises(UserError, match="refuses the key in SAMPLING_SERVER_API_KEY") as caught:
                connect(url)
            assert "s3cret" not in str(caught.value)
            monkeypatch.delenv("SAMPLING_SERVER_API_KEY")
    refused = Loopback(lambda *_: (404, {"error": {"message": "The model `x` does not exist."}}), listing("a", "b"))
    with refused.running() as url, pytest.raises(UserError, match="server_model 'x'; it lists a, b.*does not exist"):
        connect(url, server_model="x")
    later = ids_server(lambda body, nth: (401, {"error": "no"}) if nth else None)
    with later.running() as url, pytest.raises(UserError, match="refuses what it took before: status 401"):
        connect(url).sample(PROMPTS, 1, SamplingSettings(max_new_tokens=8))


def test_keys_go_to_this_machine_or_over_https_only(monkeypatch):
    monkeypatch.setenv("SAMPLING_SERVER_API_KEY", "s3cret")
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    monkeypatch.setenv("OPENAI_ORG_ID", "org")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # a proxy would see the key: not on the way to loopback
    server = ids_server()
    with server.running() as url:
        connect(url)
    (headers,) = server.headers
    assert headers["authorization"] == "Bearer s3cret"
    assert "other" not in str(headers)
    assert not any("organization" in name for name in headers)
    with pytest.raises(UserError, match="would travel to example.org unencrypted; use https"):
        connect("http://example.org/v1")
    monkeypatch.delenv("SAMPLING_SERVER_API_KEY")
    server.headers.clear()
    with server.running() as url:
        connect(url)
    assert "other" not in str(server.headers)


# ---- the stages, and a real server


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    base = LlamaForCausalLM.from_pretrained(save_ending_policy(folder / "base"))
    policy = save_policy(base, load_tokenizer(str(folder / "base")), folder / "policy", "card")
    return {
        "model_name_or_path": str(policy),
        "helpfulness_model_path": save_tiny_reward_model(folder / "helpfulness", seed=1),
        "safety_model_path": save_tiny_reward_model(folder / "safety", seed=2),
        "prompt_files": write_rows(folder / "prompts.jsonl", prompt_rows(10)),
        "samples_per_prompt": "2",
        "max_new_tokens": "8",
        "prompts_per_shard": "4",
        "server_timeout": "30",
        "server_max_retries": "1",
    }


def words_of(**named) -> list[str]:
    return [word for name, value in named.items() for word in (f"--{name}", str(value))]


def test_rejection_sampling_keeps_what_was_sampled_and_leaves_failed_prompts_out(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "load_policy", None)  # a server samples: weights are not loaded here
    chat = load_chat_format(load_tokenizer(folders["model_name_or_path"]))
    rows = rows_of(Path(folders["prompt_files"]))
    bad = chat.encode_prompt(rows[3]["prompt"])
    server = ids_server(lambda body, nth: (400, {"error": "refused"}) if body["prompt"] == bad else None)
    with server.running() as url:
        arguments = folders | {
            "output_dir": tmp_path,
            "server_url": url,
            "prompts_per_shard": "1",
        }  # a shard fails whole
        with pytest.raises(UserError, match="1 of 10 prompts failed, all others are kept"):
            rejection_sampling.main(words_of(**arguments))
        asked = len(server.requests)
        (failed,) = [row for row in stored(tmp_path) if "error" in row]
        assert failed == {"index": 3, "prompt": rows[3]["prompt"], "error": "status 400: refused"}
        summary = rejection_sampling.main(words_of(**arguments, max_failed_share=0.1))
        assert len(server.requests) - asked <= 2, "another share samples nothing again but what had failed"
    assert (summary["failed"], summary["prompts"], summary["kept"]) == (1, 9, 9)
    assert len(rows_of(tmp_path / "best.jsonl")) == 9
    assert "SAMPLING_SERVER" not in (tmp_path / "settings.yaml").read_text()


@pytest.fixture(scope="module")
def served(folders, tmp_path_factory):
    """The address of a `transformers serve` process with the tiny policy."""
    for name in ("fastapi", "uvicorn"):
        pytest.importorskip(name, reason="transformers serve needs it")
    folder, port = tmp_path_factory.mktemp("serve"), free_port()
    words = ["serve", folders["model_name_or_path"], "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    code = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    environment = os.environ | {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", code, *words], env=environment, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, folder / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, log.read_text()[-2000:]
            time.sleep(0.2)
    raise AssertionError(log.read_text()[-2000:])


@pytest.mark.slow
def test_transformers_serve_draws_by_our_settings(folders, served):
    path = folders["model_name_or_path"]
    model, tokenizer = LlamaForCausalLM.from_pretrained(path).eval(), load_tokenizer(path)
    engine = connect(served, server_model=path)
    assert (engine.dialect, engine.gives_n) == ("transformers", False)
    # Greedy, and a top-k of 1 at temperature 1 (the folder's own temperature, top-p and the endpoint's lack of a top_k
    # field notwithstanding): both are the likeliest text.
    for settings in (SamplingSettings(0.0, max_new_tokens=8), SamplingSettings(1.0, top_k=1, max_new_tokens=8)):
        batch = engine.sample(PROMPTS, 1, settings)
        assert (batch.errors, batch.exact_ids) == ({}, False)
        for prompt, ids, reason in zip(PROMPTS, batch.response_ids, batch.finish_reasons, strict=True):
            given = torch.tensor([prompt.ids])
            expected = model.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=8,
                                      temperature=None, top_p=None)[0, len(prompt.ids) :]  # fmt: skip
            text = tokenizer.decode(expected, skip_special_tokens=True)
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
            assert (reason == "stop") == (ids[-1] == 2)
    drawn = engine.sample(PROMPTS, 6, SamplingSettings(max_new_tokens=8), seed=3)
    assert len({tuple(ids) for ids in drawn.response_ids}) > 18
    with pytest.raises(UserError, match="gives no sample of server_model 'nope'.*pinned to"):
        connect(served, server_model="nope")


@pytest.mark.slow
def test_both_stages_run_on_transformers_serve(folders, served, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "load_policy", None)
    arguments = folders | {"server_url": served, "server_model": folders["model_name_or_path"], "max_new_tokens": "30"}
    summary = rejection_sampling.main(words_of(**arguments, output_dir=tmp_path / "rs", keep_unfinished="true"))
    assert (summary["prompts"], summary["failed"], summary["responses"]) == (10, 0, 20)
    (row, *_) = stored(tmp_path / "rs")
    assert row["response_ids"][0]
    assert json.loads((tmp_path / "rs" / "summary.json").read_text())["stage"] == "rejection_sampling"
    own = ("helpfulness_model_path", "safety_model_path", "samples_per_prompt")
    collecting = {name: value for name, value in arguments.items() if name not in own}
    summary = collect_preferences.main(words_of(**collecting, output_dir=tmp_path / "collect"))
    assert summary["failed"] == 0
    assert summary["pairs"] + summary["skipped_identical"] + summary["skipped_unusable"] == 10
    assert summary["pairs"] > 5
