"""The two Ghost Attention scripts through their real mains: a scripted engine builds, a tiny model is measured."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rlhf.dialogues
import rlhf.models
import rlhf.server_engine
from configs.chat import load_chat_format
from configs.errors import UserError
from configs.gatt_settings import GattSettings, InstructionSettings, PersistenceSettings
from configs.records import read_dialogues
from gatt.instructions import obeys, parse_instruction
from gatt.kinds import KINDS, Instruction, values_of
from gatt.synth import Draft
from reward.model import load_reward_model
from reward.scorer import score_ids
from rlhf import build_gatt, evaluate_gatt
from rlhf.build_gatt import reward_judge
from rlhf.gatt_plans import draw_instructions, draw_user_turns, make_plans, usable_dialogues, usable_prompts
from rlhf.samples import SampleBatch
from rlhf.shards import read_shard
from tests.tiny_models import save_tiny_reward_model

QUESTIONS = [f"What is {a} plus {b}?" for a in range(8) for b in range(5)]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokens = ["<unk>", "<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=260, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=8192,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def prompt_file(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": text}], "is_safety": False} for text in QUESTIONS]
    rows.append({"prompt": [{"role": "user", "content": "Always act as Homer. " + QUESTIONS[0]}], "is_safety": False})
    rows.append({"prompt": [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]})
    rows[-1]["is_safety"] = False
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Obedient:
    """Obeys the instruction in sight, but fails its first try at every later turn of every third dialogue."""

    calls: list[int] = []
    die_at: int | None = None

    def __init__(self, model, chat_format, pad_id, settings, max_length, seed):
        self.seed = seed
        self.asked: dict[tuple[int, int], int] = {}

    def __call__(self, rows, contexts):
        type(self).calls.append(len(rows))
        if type(self).die_at is not None and len(type(self).calls) >= type(self).die_at:
            raise KeyboardInterrupt
        return [self.reply(row, context) for row, context in zip(rows, contexts)]

    def reply(self, row, context):
        turn = len(context)
        self.asked[row, turn] = self.asked.get((row, turn), 0) + 1
        first = context[0] if context[0]["role"] == "system" and len(context) == 2 else context[-1]
        parsed = parse_instruction(first["content"])
        if parsed is None:
            return Draft(f"A plain answer {self.seed % 97}.")
        if row % 3 == 0 and turn > 2 and self.asked[row, turn] == 1:
            return Draft("I forgot.")
        value = parsed[0].value
        return Draft(f"{value}, it is so {self.seed % 97}, {value}")


def build(output_dir, model_dir, prompt_file, *more):
    return build_gatt.main([
        "--model_name_or_path", str(model_dir), "--prompt_files", str(prompt_file), "--output_dir", str(output_dir),
        "--num_dialogues", "12", "--min_turns", "2", "--max_turns", "3", "--chunk_size", "5", "--use_cpu", "true",
        "--max_length", "800", *more,
    ])  # fmt: skip


@pytest.fixture
def obedient(monkeypatch):
    monkeypatch.setattr(rlhf.dialogues, "DialogueEngine", Obedient)
    monkeypatch.setattr(Obedient, "calls", [])
    monkeypatch.setattr(Obedient, "die_at", None)
    return Obedient


def test_build(obedient, model_dir, prompt_file, tmp_path):
    summary = build(tmp_path / "out", model_dir, prompt_file)
    # 12 dialogues, a tenth of them plain, are 60 % of the rows, so 8 single turns are the other 40 %, half plain
    assert summary["rows_by_source"] == {"gatt": 11, "gatt_single_turn": 4, "gatt_plain": 5}
    assert summary["rows"] == summary["planned"] == summary["finished"] == 20
    assert summary["chunks"] == 4
    assert (summary["prompts_used"], summary["prompts_with_instruction"], summary["prompts_multi_turn"]) == (40, 1, 1)
    # In chunks of 5 dialogues, rows 0 and 3 (and 0 and 3, and 0) of the 11 fail their first draft of turn 2
    assert summary["first_draft_obedience"]["1"] == 1.0
    assert summary["first_draft_obedience"]["2"] == pytest.approx(6 / 11)
    assert summary["replies_sampled"] > summary["replies_kept"]

    rows = [json.loads(line) for line in (tmp_path / "out" / "gatt.jsonl").read_text().splitlines()]
    assert len(read_dialogues(tmp_path / "out" / "gatt.jsonl").rows) == 20  # what sft.py reads
    for row in rows:
        users = [m["content"] for m in row["messages"] if m["role"] == "user"]
        assert row["train_on"] == "all"
        if row["source"] == "gatt_plain":
            assert row["instruction"] is None
            assert all(user in QUESTIONS for user in users)
            continue
        wording, slot = row["instruction"]["wording"], row["instruction"]["slot"]
        assert wording in (row["instruction"]["text"], row["instruction"]["short_text"])
        first = row["messages"][0]
        assert first["role"] == slot
        assert first["content"].startswith(wording)
        assert all(user in QUESTIONS for user in users[1:])  # the instruction is in the first turn only
        assert len(set(users)) == len(users)
        instruction = Instruction(*(row["instruction"][k] for k in ("kind", "value", "text", "short_text")))
        assert instruction.value in values_of(instruction.kind, "train")
        assert all(obeys(instruction, m["content"]) for m in row["messages"] if m["role"] == "assistant")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| 2 | 0.545 |" in card
    assert str(model_dir) in card
    obedient.calls.clear()
    assert build(tmp_path / "out", model_dir, prompt_file)["rows"] == 20
    assert obedient.calls == []  # a finished build is not run again


def test_a_killed_build_goes_on_and_gives_the_same_rows(obedient, model_dir, prompt_file, tmp_path):
    build(tmp_path / "whole", model_dir, prompt_file)
    calls = len(obedient.calls)
    obedient.calls.clear()
    obedient.die_at = 6  # in the second chunk
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "killed", model_dir, prompt_file)
    assert not (tmp_path / "killed" / "gatt.jsonl").exists()
    obedient.die_at = None
    obedient.calls.clear()
    summary = build(tmp_path / "killed", model_dir, prompt_file)
    assert summary["chunks_resumed"] == 1
    assert len(obedient.calls) < calls
    assert (tmp_path / "killed" / "gatt.jsonl").read_bytes() == (tmp_path / "whole" / "gatt.jsonl").read_bytes()
    # other settings never continue these shards
    assert build(tmp_path / "killed", model_dir, prompt_file, "--seed", "1")["chunks_resumed"] == 0


def test_the_paper_s_rows_and_replay(obedient, model_dir, prompt_file, tmp_path):
    replay = tmp_path / "replay.jsonl"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    replay.write_text("".join(json.dumps({"messages": messages}) + "\n" for _ in range(30)))
    more = ("--train_on", "last", "--replay_files", str(replay), "--replay_files_share", "0.2")
    summary = build(tmp_path / "out", model_dir, prompt_file, *more)
    assert summary["rows_by_source"]["gatt_replay"] == 5  # 5 of 25 rows are 20 %
    rows = [json.loads(line) for line in (tmp_path / "out" / "gatt.jsonl").read_text().splitlines()]
    assert {(row["source"], row["train_on"]) for row in rows} == {
        ("gatt", "last"), ("gatt_single_turn", "all"), ("gatt_plain", "all"), ("gatt_replay", "all")
    }  # fmt: skip


def test_rows_of_combinations_say_their_parts(obedient, model_dir, prompt_file, tmp_path):
    summary = build(tmp_path / "out", model_dir, prompt_file, "--kinds", "figure", "hobby", "--max_constraints", "2")
    rows = [json.loads(line) for line in (tmp_path / "out" / "gatt.jsonl").read_text().splitlines()]
    given = [row for row in rows if row["instruction"]]
    assert set(summary["rows_by_kind"]) == {"figure", "hobby", "figure+hobby"}
    for row in given:
        instruction, rest = parse_instruction(row["instruction"]["text"])
        assert rest == ""
        assert {**instruction.record(), "wording": row["instruction"]["wording"],
                "slot": row["instruction"]["slot"]} == row["instruction"]  # fmt: skip
        assert [part["kind"] for part in row["instruction"].get("parts", [])] == [p.kind for p in instruction.parts]
        assert all(obeys(instruction, m["content"]) for m in row["messages"] if m["role"] == "assistant")
    assert len(read_dialogues(tmp_path / "out" / "gatt.jsonl").rows) == len(rows)


@pytest.mark.parametrize("train_on", ["all", "last"])
def test_a_share_of_the_dialogues_changes_its_instruction(obedient, model_dir, prompt_file, tmp_path, train_on):
    more = ("--change_share", "0.5", "--train_on", train_on, "--max_length", "260")
    summary = build(tmp_path / "out", model_dir, prompt_file, *more)
    rows = [json.loads(line) for line in (tmp_path / "out" / "gatt.jsonl").read_text().splitlines()]
    changed = [row for row in rows if "change" in row]
    assert summary["rows_with_change"] == len(changed) > 2
    assert {row["source"] for row in changed} == {"gatt"}
    for row in changed:
        old, new = row["instruction"], row["change"]
        assert new["kind"] == old["kind"]
        assert new["value"] != old["value"]
        turns = [m["content"] for m in row["messages"] if m["role"] == "user"]
        assert [t for t, text in enumerate(turns, 1) if text.startswith(new["wording"])] == [new["turn"]]
        for turn, reply in enumerate((m["content"] for m in row["messages"] if m["role"] == "assistant"), 1):
            now, then = (new, old) if turn >= new["turn"] else (old, new)
            assert now["value"] in reply
            assert then["value"] not in reply
        assert row["train_on"] == train_on
    assert (
        read_dialogues(tmp_path / "out" / "gatt.jsonl").rows[rows.index(changed[0])]["change"] == changed[0]["change"]
    )


def test_plans_with_changes_differ_in_nothing_else():
    prompts = usable_prompts(prompts_of(QUESTIONS))[0]
    settings = GattSettings(num_dialogues=200, kinds=["figure", "hobby"], min_turns=1, max_turns=4)
    plain = make_plans(settings, prompts, 0)
    settings.change_share = 0.5
    changed = make_plans(settings, prompts, 0)
    assert [(replace(plan, change=None), *rest) for plan, *rest in changed] == plain
    assert all(plan.change is None for plan, _, _ in plain)
    marked = [plan for plan, _, _ in changed if plan.change]
    assert len(marked) == round(0.5 * sum(len(plan.user_turns) > 1 for plan, _, source in plain[:180]))
    assert {plan.change.turn - len(plan.user_turns) for plan in marked} == {0, -1, -2}
    assert {plan.change.turn for plan in marked} == {2, 3, 4}
    assert all(plan.instruction.kind == plan.change.instruction.kind for plan in marked)


def test_a_kind_of_one_value_cannot_change(tmp_path):
    (tmp_path / "v.json").write_text(json.dumps({"figure": ["Nero"]}))
    settings = GattSettings(values_file=str(tmp_path / "v.json"), change_share=1.0, num_dialogues=4)
    with pytest.raises(UserError, match="change_share: 1.0, but no instruction drawn can change"):
        make_plans(settings, usable_prompts(prompts_of(QUESTIONS))[0], 0)


def test_only_what_can_change_changes():
    settings = GattSettings(kinds=["haiku", "max_words", "figure"], change_share=1.0, num_dialogues=60, min_turns=2)
    changes = [(plan.instruction, plan.change.instruction) for plan, _, _ in
               make_plans(settings, usable_prompts(prompts_of(QUESTIONS))[0], 0) if plan.change]  # fmt: skip
    assert {old.kind for old, _ in changes} == {"max_words", "figure"}  # a haiku has no value
    # Fewer words than before would obey the old limit as well.
    assert all(int(new.value) > int(old.value) for old, new in changes if old.kind == "max_words")


def test_rows_of_another_values_file_are_not_taken_for_these(obedient, model_dir, prompt_file, tmp_path):
    (tmp_path / "v.json").write_text(json.dumps({"figure": ["Nero", "Homer"]}))
    more = ("--values_file", str(tmp_path / "v.json"))
    build(tmp_path / "out", model_dir, prompt_file, *more)
    (tmp_path / "v.json").write_text(json.dumps({"figure": ["Dante", "Plato"]}))  # the same name
    build(tmp_path / "out", model_dir, prompt_file, *more)
    rows = [json.loads(line) for line in (tmp_path / "out" / "gatt.jsonl").read_text().splitlines()]
    assert {row["instruction"]["value"] for row in rows if row["instruction"]} == {"Dante", "Plato"}


def test_a_policy_that_never_obeys_is_told(model_dir, prompt_file, tmp_path):
    with pytest.raises(UserError, match="no dialogue obeyed its instruction"):
        build(tmp_path / "out", model_dir, prompt_file, "--max_new_tokens", "4")
    assert not (tmp_path / "out" / "summary.json").exists()


def test_judge_switches_to_safety_by_tag_and_threshold(model_dir):
    chat_format = load_chat_format(AutoTokenizer.from_pretrained(model_dir))
    safety = {2: [5.0, 1.0], 3: [3.0, 2.0, -4.0]}
    read = []

    def helpfulness(rows, ids):
        read.append((rows, ids))
        return [[float(k) for k in range(len(each))] for each in ids]

    judge = reward_judge(
        chat_format, {"risky": True, "calm": False}, helpfulness, lambda rows, ids: [safety[len(each)] for each in ids]
    )
    napoleon = KINDS["figure"].make("Napoleon")
    texts = ["Always act as Napoleon. risky", "risky", "Always act as Napoleon. calm", "Always act as Napoleon. calm"]
    contexts = [[{"role": "user", "content": text}] for text in texts]
    candidates = [["x"] * 2, ["x"] * 2, ["x"] * 3, ["x", "y"]]
    assert judge([4, 5, 7, 9], contexts, candidates, [napoleon, None, napoleon, napoleon]) == [
        [5.0, 1.0], [5.0, 1.0],
        [0.0, 1.0, -4.0],  # -4 is below logit(0.15): unsafe
        [0.0, 1.0],
    ]  # fmt: skip
    ((rows, ids),) = read
    assert rows == [4, 5, 7, 9]
    assert ids[3][1] == chat_format.encode_dialogue([*contexts[3], {"role": "assistant", "content": "y"}]).input_ids


def test_turns_by_themselves_and_plain_rows_at_their_own_temperature(
    obedient, model_dir, prompt_file, tmp_path, monkeypatch
):
    asked = []

    class Turns(Obedient):
        def __init__(self, engine, chat_format, settings, max_length, seed, max_failed_share):
            super().__init__(engine, chat_format, 3, settings, max_length, seed)
            assert engine.name == "in_process"
            self.temperature = settings.temperature

        def __call__(self, rows, contexts):
            asked.extend((self.temperature, context) for context in contexts)
            return super().__call__(rows, contexts)

    monkeypatch.setattr(rlhf.dialogues, "ContextEngine", Turns)
    more = ("--sampling_context", "turn", "--temperature", "0.3", "--plain_temperature", "1")
    summary = build(tmp_path / "out", model_dir, prompt_file, *more)
    assert summary["rows_by_source"] == {"gatt": 11, "gatt_single_turn": 4, "gatt_plain": 5}
    assert len(asked) == summary["replies_sampled"]
    assert {len([m for m in context if m["role"] != "system"]) for _, context in asked} == {1}
    instructed = {any(parse_instruction(m["content"]) for m in context): t for t, context in asked}
    assert instructed == {True: 0.3, False: 1.0}
    for t, context in asked:
        assert t == (0.3 if any(parse_instruction(m["content"]) for m in context) else 1.0)
    rows = [json.loads(line) for line in (tmp_path / "out" / "gatt.jsonl").read_text().splitlines()]
    long = [row for row in rows if row["source"] == "gatt"]
    assert {sum(m["role"] == "user" for m in row["messages"]) for row in long} == {2, 3}
    assert all(sum(bool(parse_instruction(m["content"])) for m in row["messages"]) == 1 for row in long)


@pytest.mark.parametrize("context", ["dialogue", "turn"])
def test_any_engine_samples_the_replies(model_dir, prompt_file, tmp_path, monkeypatch, context):
    """A server, scripted: it is given whole dialogues or turns, loads no policy, and its temperature reaches it."""
    asked = []

    class Server:
        name = "server"
        config = LlamaConfig(max_position_embeddings=8192)

        def __init__(self, settings, path, chat, config, sampling):
            assert (settings.server_url, path, sampling.temperature) == ("http://127.0.0.1:1/v1", str(model_dir), 0.4)
            self.chat = chat

        def sample(self, prompts, k, settings, seed=0):
            texts = []
            for prompt in prompts:
                assert prompt.ids == self.chat.encode_prompt(prompt.messages)
                asked.append(prompt.messages)
                first = prompt.messages[0] if len(prompt.messages) == 2 else prompt.messages[-1]
                parsed = parse_instruction(first["content"])
                texts.append(f"{parsed[0].value}, it is, {parsed[0].value}" if parsed else "Plain.")
            ids = [self.chat.tokenizer.encode(text, add_special_tokens=False) for text in texts]
            return SampleBatch(ids, [], [], ["stop"] * len(ids), [], k, exact_ids=False)

    monkeypatch.setattr(rlhf.server_engine, "Server", Server)
    monkeypatch.setattr(rlhf.models, "load_policy", None)
    more = ("--server_url", "http://127.0.0.1:1/v1", "--temperature", "0.4", "--sampling_context", context)
    summary = build(tmp_path / "out", model_dir, prompt_file, *more)
    assert summary["rows_by_source"] == {"gatt": 11, "gatt_single_turn": 4, "gatt_plain": 5}
    longest = max(sum(m["role"] == "user" for m in messages) for messages in asked)
    assert longest == (3 if context == "dialogue" else 1)


def test_an_engine_setting_without_effect_is_refused(model_dir, prompt_file, tmp_path):
    with pytest.raises(UserError, match="server_model: 'x' has no effect"):
        build(tmp_path / "out", model_dir, prompt_file, "--server_model", "x")


def dialogue(*turns: str, system: str = "") -> dict:
    """Of user turns; what was answered does not matter."""
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": f"Said to {turn}"}]
    return {"messages": messages}


def test_which_dialogues_can_be_asked_again():
    rows = [
        dialogue("a", "and b?"), dialogue("a"), dialogue("a", "and b?"), dialogue("a", "and b?", "c"),
        dialogue("a", "b", system="Be short."), dialogue("a", "Always act as Homer. b"),
    ]  # fmt: skip
    found, counts = usable_dialogues(rows, min_turns=2)
    assert found == [["a", "and b?"], ["a", "and b?", "c"]]
    assert counts == {
        "dialogues_used": 2, "dialogues_doubled": 1, "dialogues_too_short": 1, "dialogues_with_system": 1,
        "dialogues_with_instruction": 1,
    }  # fmt: skip


def write_dialogues(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_turns_of_dialogues_are_asked_as_they_follow_each_other(obedient, model_dir, prompt_file, tmp_path):
    rows = [dialogue(*(f"Question {d}, part {t}." for t in range(2 + d % 4))) for d in range(14)]
    path = write_dialogues(tmp_path / "dialogues.jsonl", rows)
    summary = build(tmp_path / "out", model_dir, prompt_file, "--dialogue_files", path)
    assert summary["rows_by_source"] == {"gatt": 11, "gatt_single_turn": 4, "gatt_plain": 5}
    assert (summary["dialogues_used"], summary["dialogues_too_short"]) == (14, 0)
    built = [json.loads(line) for line in (tmp_path / "out" / "gatt.jsonl").read_text().splitlines()]
    asked = set()
    for row in built:
        turns = [m["content"] for m in row["messages"] if m["role"] == "user"]
        if len(turns) == 1:
            assert any(question in turns[0] for question in QUESTIONS)  # single turns are the prompts'
            continue
        turns[0] = turns[0].split("Question ")[1]
        number = int(turns[0].split(",")[0])
        asked.add(number)
        # In order from the first on, three at most (max_turns); the instruction stands in front of the first alone.
        assert turns == [f"{number}, part 0."] + [f"Question {number}, part {t}." for t in range(1, len(turns))]
        assert len(turns) == min(2 + number % 4, 3)
        assert not any(m["content"].startswith("Said to") for m in row["messages"])  # answered anew
    assert len(asked) == 12  # different dialogues


def test_dialogues_alone_give_the_single_turns_too(obedient, model_dir, tmp_path):
    rows = [dialogue(f"Question {d}.", "And then?") for d in range(12)]
    path = write_dialogues(tmp_path / "dialogues.jsonl", rows)
    summary = build_gatt.main([
        "--model_name_or_path", str(model_dir), "--dialogue_files", path, "--output_dir", str(tmp_path / "out"),
        "--num_dialogues", "12", "--use_cpu", "true", "--max_length", "800",
    ])  # fmt: skip
    assert summary["rows_by_source"] == {"gatt": 11, "gatt_single_turn": 4, "gatt_plain": 5}
    built = [json.loads(line) for line in (tmp_path / "out" / "gatt.jsonl").read_text().splitlines()]
    single = [row["messages"][-2]["content"] for row in built if sum(m["role"] == "user" for m in row["messages"]) == 1]
    assert len(single) == 8
    assert all("Question " in text for text in single)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num_dialogues", "3"], "dialogue_files: 2 usable dialogues .* are fewer than num_dialogues: 3"),
        (["--sampling_context", "turn"], "sampling_context: the turns of dialogue_files may build on each other"),
    ],
)
def test_dialogues_that_cannot_be_asked_are_told(model_dir, prompt_file, tmp_path, more, message):
    path = write_dialogues(tmp_path / "dialogues.jsonl", [dialogue("a", "b"), dialogue("c", "d"), dialogue("e")])
    with pytest.raises(UserError, match=message):
        build(tmp_path / "out", model_dir, prompt_file, "--dialogue_files", path, *more)


def test_a_reward_model_of_another_tokenizer_is_refused(model_dir, prompt_file, tmp_path):
    reward = save_tiny_reward_model(tmp_path / "reward", seed=1)
    with pytest.raises(UserError, match="helpfulness_reward_model: .*reward has another tokenizer than the policy"):
        build(tmp_path / "out", model_dir, prompt_file, "--helpfulness_reward_model", reward)
    assert not (tmp_path / "out" / "shards").exists()


def test_the_reward_model_picks_the_reply_that_is_built(obedient, model_dir, prompt_file, tmp_path, monkeypatch):
    """The whole script with two drafts a turn: each kept reply is the one that the model scores above the other."""
    reward = save_tiny_reward_model(tmp_path / "reward", seed=1)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(reward)  # its embedding is large enough
    asked = []
    inner = build_gatt.synthesise

    def synthesise(plans, reply, obeys, max_candidates, judge, context):
        def recorded(rows, contexts, candidates, instructions):
            scores = judge(rows, contexts, candidates, instructions)
            asked.append((contexts, candidates, scores))
            return scores

        return inner(plans, reply, obeys, max_candidates, recorded, context)

    monkeypatch.setattr(build_gatt, "synthesise", synthesise)
    more = ("--helpfulness_reward_model", reward, "--max_candidates", "2")
    build(tmp_path / "out", model_dir, prompt_file, *more)
    chat_format = load_chat_format(AutoTokenizer.from_pretrained(model_dir))
    model = load_reward_model(reward)
    assert asked
    for contexts, candidates, scores in asked:
        for context, texts, found in zip(contexts, candidates, scores):
            dialogues = [[*context, {"role": "assistant", "content": text}] for text in texts]
            expected = score_ids(model, [chat_format.encode_dialogue(each).input_ids for each in dialogues])
            torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=1e-4)


# --- persistence


class Forgetful:
    """Obeys for `holds` turns; answers "yes", with an instruction in sight or not."""

    holds = 3

    def __init__(self, *args):
        pass

    def __call__(self, rows, contexts):
        drafts = []
        for row, context in zip(rows, contexts):
            turn = sum(m["role"] == "user" for m in context)
            parsed = parse_instruction(context[0]["content"])
            if row == 1 and turn == 5:
                drafts.append(Draft("", "too_long"))
            elif parsed and turn <= self.holds:
                drafts.append(Draft(f"I am {parsed[0].value}." + ("" if turn == 2 and row == 0 else " yes, sir.")))
            else:
                drafts.append(Draft("yes."))
        return drafts


def persistence(monkeypatch, answer_check="gold", **more):
    monkeypatch.setattr(rlhf.dialogues, "DialogueEngine", Forgetful)
    turns = [[f"q{d}{t}" for t in range(6)] for d in range(4)]
    settings = PersistenceSettings(num_dialogues=4, num_turns=6, answer_check=answer_check)
    tokenizer = type("T", (), {"pad_token_id": 3})()
    given = more.pop("instructions", [KINDS["figure"].make(v) for v in ("Napoleon", "Mozart", "Homer", "Dante")])
    turns = more.pop("user_turns", turns)
    gold = more.pop("gold", lambda messages, reply: 1.0 if reply.startswith("yes") else 0.0)
    return evaluate_gatt.run_persistence(None, tokenizer, None, turns, given, settings, gold=gold, **more)


def test_persistence_by_turn(monkeypatch):
    table = persistence(monkeypatch)
    # Turn 2: dialogue 0 obeys but does not answer. Turns 4 on: forgotten. Dialogue 1 fills its context at turn 5.
    assert [table[str(t)] for t in range(1, 7)] == [1.0, 0.75, 1.0, 0.0, 0.0, 0.0]
    assert table["obeyed"]["2"] == 1.0
    assert table["missing"] == {"5": 1, "6": 1}
    assert table["gold_without_instruction"] == 1.0
    assert "unseen" not in table
    assert persistence(monkeypatch, answer_check="none")["2"] == 1.0
    unseen = persistence(monkeypatch, unseen_instructions=[KINDS["figure"].make("Zeno")] * 4)["unseen"]
    assert unseen["1"] == 1.0
    assert unseen["by_kind"].keys() == {"figure"}


def test_an_answer_is_compared_with_the_reply_without_the_instruction(monkeypatch):
    asked = []

    def gold(messages, reply):
        asked.append(messages)
        return {"yes.": 0.5, "yes, sir.": worth}.get(reply, 0.0)

    worth = 0.35  # 0.7 of the plain reply's 0.5; the sentence that only obeys is left out before
    assert persistence(monkeypatch, gold=gold)["1"] == 1.0
    worth = 0.34
    assert persistence(monkeypatch, gold=gold)["1"] == 0.0
    assert all("act as" not in m["content"] and "Figure" not in m["content"] for messages in asked for m in messages)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"user_turns": []}, "num_dialogues is 0"),
        ({"user_turns": [["a"], [], ["a"], ["a"]]}, "dialogue 1 has zero user turns"),
        ({"instructions": []}, "0 instructions for 4 dialogues"),
        ({"unseen_instructions": [KINDS["figure"].make("Zeno")]}, "1 unseen instructions for 4 dialogues"),
        ({"gold": None}, "no gold score"),
    ],
)
def test_persistence_refuses_what_it_cannot_measure(monkeypatch, more, words):
    with pytest.raises(UserError, match=words):
        persistence(monkeypatch, **more)


def test_evaluate_gatt_main(model_dir, prompt_file, tmp_path):
    summary = evaluate_gatt.main([
        "--model_name_or_path", str(model_dir), "--baseline_model_name_or_path", str(model_dir), "--prompt_files",
        str(prompt_file), "--output_dir", str(tmp_path), "--num_dialogues", "8", "--num_turns", "20",
        "--eval_max_new_tokens", "6", "--max_length", "700", "--use_cpu", "true",
    ])  # fmt: skip
    on_disk = json.loads((tmp_path / "summary.json").read_text())
    assert on_disk["trained"] == on_disk["baseline"]  # the same weights on the same dialogues with the same seeds
    table = summary["trained"]
    assert table["1"] == 0.0  # random weights obey nothing
    # A turn takes about 9 + 19 + 6 + 1 tokens or more, so 700 hold fewer than 20 turns: nothing is hidden
    assert table["20"] is None
    assert table["missing"]["20"] == 8
    assert set(table["ci95"]) == {str(t) for t in range(1, 21)}
    assert set(table["unseen"]["ci95"]) == set(table["ci95"])
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert {(s["policy"], s["values"]) for s in samples} == {
        (p, v) for p in ("trained", "baseline") for v in ("seen", "unseen")
    }


# --- drawing and bad input


def prompts_of(texts):
    return [{"prompt": [{"role": "user", "content": text}]} for text in texts]


def test_plans_depend_on_the_seed_alone():
    prompts = usable_prompts(prompts_of(QUESTIONS))[0]
    settings = GattSettings(num_dialogues=200, kinds=["figure", "hobby"], replay_single_turn_share=0.5)
    plans = make_plans(settings, prompts, 0)
    assert plans == make_plans(settings, prompts, 0) != make_plans(settings, prompts, 1)
    assert len(plans) == 400
    assert [source for _, _, source in plans[180:]] == ["gatt_plain"] * 20 + ["gatt_single_turn"] * 100 + [
        "gatt_plain"
    ] * 100
    for plan, wording, source in plans:
        assert (plan.instruction is None) == (source == "gatt_plain") == (wording == "")
    assert all(len(plan.user_turns) > 1 for plan, _, _ in plans[180:200])
    dialogues = plans[:180]
    assert {len(plan.user_turns) for plan, _, _ in dialogues} == set(range(2, 9))
    assert {plan.instruction.kind for plan, _, _ in dialogues} == {"figure", "hobby"}
    short = sum(wording == plan.instruction.short_text for plan, wording, _ in dialogues)
    assert 63 < short < 117  # half, within 4 standard errors of 180 draws
    assert 63 < sum(plan.slot == "system" for plan, _, _ in dialogues) < 117


def test_too_few_prompts_and_zero_turns_are_refused():
    import random

    with pytest.raises(UserError, match="2 different single-turn prompts .* dialogues of 3 turns"):
        draw_user_turns(prompts_of(["a", "b"]), [2, 3], random.Random(0))
    with pytest.raises(UserError, match="zero turns"):
        draw_user_turns(prompts_of(["a", "b"]), [2, 0], random.Random(0))


@pytest.mark.parametrize(
    ("values", "unseen", "kinds", "split", "words"),
    [
        (None, None, [], "train", "kinds: the list is empty"),
        (None, None, ["weather"], "train", "unknown instruction kind 'weather'"),
        ({"weather": ["rain"]}, None, None, "train", "unknown instruction kind 'weather'"),
        ({}, None, None, "train", "must hold an object"),
        ({"figure": []}, None, None, "train", "empty list"),
        ({"figure": ["[INST] x"]}, None, None, "train", "special tag"),
        ({"figure": ["Nero"]}, None, ["hobby"], "train", "has no values of kind: hobby"),
        ({"figure": ["Nero"]}, {"figure": ["nero", "Zeno"]}, None, "unseen", "nero also in values_file"),
        ({"figure": ["Nero"]}, None, None, "unseen", "needed beside values_file"),
    ],
)
def test_contradicting_values_are_refused(tmp_path, values, unseen, kinds, split, words):
    import random

    paths = {}
    for name, content in (("values_file", values), ("unseen_values_file", unseen)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
            paths[name] = str(tmp_path / name)
    with pytest.raises(UserError, match=words):
        draw_instructions(InstructionSettings(kinds=kinds, **paths), 4, split, random.Random(0))


def test_values_files_replace_the_starter_lists(tmp_path):
    import random

    (tmp_path / "v.json").write_text(json.dumps({"figure": ["Nero"], "hobby": ["chess"]}))
    settings = InstructionSettings(values_file=str(tmp_path / "v.json"))
    drawn = draw_instructions(settings, 6, "train", random.Random(0))
    assert sorted(i.value for i in drawn) == ["Nero"] * 3 + ["chess"] * 3


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"num_dialogues": 0}, "num_dialogues: 0"),
        ({"min_turns": 0}, "min_turns: 0"),
        ({"min_turns": 4, "max_turns": 3}, "max_turns: 3 is less than min_turns: 4"),
        ({"short_share": 1.5}, "short_share: 1.5"),
        ({"replay_single_turn_share": 1.0}, "below 1"),
        ({"max_candidates": 0}, "max_candidates: 0"),
        ({"change_share": 2.0}, "change_share: 2.0"),
        ({"change_share": 0.1, "min_turns": 1, "max_turns": 1}, "raise max_turns"),
        ({"train_on": "some"}, "train_on: 'some'"),
        ({"sampling_context": "all"}, "sampling_context: 'all' is unknown; use dialogue or turn"),
        ({"plain_temperature": -0.1}, "plain_temperature: -0.1 is out of range"),
        ({"safety_reward_model": "x"}, "needs helpfulness_reward_model"),
        ({"helpfulness_reward_model": "x", "max_candidates": 1}, "nothing to pick from with max_candidates: 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(more, words):
    with pytest.raises(UserError, match=words):
        GattSettings(**more)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"num_turns": -1}, "num_turns: -1"),
        ({"answer_check": "maybe"}, "answer_check: 'maybe'"),
        ({"change_turn": 1}, "change_turn: 1 must be from 2"),
        ({"change_turn": 21}, "change_turn: 21 .* num_turns: 20"),
        ({"change_turn": -3, "num_turns": 0}, "change_turn: -3"),
        ({"baseline_dir": "a", "baseline_model_name_or_path": "b"}, "baseline_dir: it stands in place"),
    ],
)
def test_measurements_that_cannot_work_are_refused(more, words):
    with pytest.raises(UserError, match=words):
        PersistenceSettings(**more)


def test_a_dialogue_longer_than_the_context_is_cut_and_counted(model_dir, prompt_file, tmp_path, monkeypatch):
    """The real engine: the first turn already leaves no room, so every dialogue is lost, with its reason."""
    with pytest.raises(UserError, match="no dialogue obeyed"):
        build(tmp_path / "out", model_dir, prompt_file, "--max_length", "60", "--max_new_tokens", "50")
    rows = read_shard(next((tmp_path / "out").glob("shards/*/00000.jsonl.gz")))
    assert {row["refused"] for row in rows} == {"too_long"}
    shutil.rmtree(Path(tmp_path / "out"))
