"""Kinds of instructions, their checkers, and combinations of them: by hand, and as properties over random draws."""

import hashlib
import importlib.util
import json
import random
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.chat import load_chat_format
from configs.errors import UserError
from configs.gatt_settings import GattSettings, InstructionSettings, PersistenceSettings
from gatt import languages
from gatt.checkers import words
from gatt.instructions import (
    check_kinds,
    combine,
    obeyed_parts,
    obeys,
    parse_instruction,
    sample_instructions,
    strip_obedience,
)
from gatt.kinds import DEFAULT_KINDS, KINDS, go_together, kind_named, largest_combination, values_of
from gatt.languages import language_of
from gatt.syllables import syllables
from rlhf.gatt_plans import check_encodable, draw_instructions, make_plans, usable_prompts
from rlhf.simulation.people import decorate

HAIKU = "An old silent pond\nA frog jumps into the pond\nSplash! Silence again"  # 5, 7, 5


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("frog", 1), ("silent", 2), ("little", 2), ("table", 2), ("loved", 1), ("wanted", 2), ("boxes", 2),
        ("homes", 1), ("piano", 3), ("going", 2), ("something", 2), ("everyone", 3), ("nation", 2), ("curious", 3),
        ("fire", 2), ("didn't", 2), ("don't", 1), ("business", 2), ("beautiful", 3), ("a", 1), ("poetry", 3),
        ("You’re", 1), ("12 + 30", 0), ("", 0),
        ("Over the wintry", 5), ("A broken signboard banging", 7), ("with no leaves to blow.", 5),
    ],
)  # fmt: skip
def test_syllables(text, count):
    assert syllables(text) == count


# What obeys and what does not, by kind and value
CASES = [
    ("figure", "Napoleon", ["I am Napoleon.", "napoleon!", "Moi, Napoléon."], ["Napoleonic wars", "Bonaparte"]),
    ("figure", "Oscar Wilde", ["Oscar Wilde here."], ["Oscar is wild. Wilde!"]),
    ("hobby", "chess", ["I enjoy chess."], ["I enjoy chessboards."]),
    ("last_word", "river", ["To the River."], ["river bank", ""]),
    ("first_word", "river", ["River, it is so.", "- river: yes"], ["The river", ""]),
    ("haiku", "", [HAIKU, HAIKU.replace("\n", "\n\n") + "\n"],
     [HAIKU.replace("\n", " / "), HAIKU + "\nAgain", HAIKU.replace("old ", ""), "\n".join(HAIKU.split("\n")[:2]), ""]),
    ("one_sentence", "", ["A lemon is yellow.", "Yes", "Dr. John F. Kennedy (a man) sat.", "It costs 3.50 euros!"],
     ["One. Two.", "Yes!\nNo", "Is it? Yes.", '"No." He left.', "这是。那是。", "", "..."]),
    ("lower_case", "", ["a lemon is yellow.", "élan 3"], ["A lemon", "42", ""]),
    ("max_words", "3", ["one two three", "Well-known fact."], ["one two three four", "..."]),
    ("bullets", "2", ["- a\n- b", "Two things:\n* one\n\n  • two\nThat is all."],
     ["- a", "- a\n- b\n- c", "-a\n-b", "- \n- a", "- ...\n- a"]),
    ("language", "French", ["La capitale de la France est Paris."],
     ["The capital of France is Paris.", "Yes.", "42", ""]),
    ("language", "Japanese", ["フランスの首都はパリです。"], ["法国的首都是巴黎。"]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "value", "good", "bad"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_checkers(kind, value, good, bad):
    instruction = KINDS[kind].make(value)
    assert [text for text in good if not obeys(instruction, text)] == []
    assert [text for text in bad if obeys(instruction, text)] == []


@pytest.mark.parametrize(
    ("kind", "value", "response", "left"),
    [
        ("figure", "Napoleon", "I am Napoléon. It is red.", "It is red."),
        ("bullets", "2", "Two:\n- red\n- blue", "Two: red blue"),
        ("haiku", "", HAIKU, HAIKU),
        ("language", "French", "Oui, bien sûr.", "Oui, bien sûr."),
    ],
)
def test_what_only_obeys_is_taken_off(kind, value, response, left):
    assert strip_obedience(KINDS[kind].make(value), response) == left


def test_every_kind_has_a_case_and_one_value_or_none():
    assert {case[0] for case in CASES} == set(KINDS)
    for kind in KINDS.values():
        assert bool(kind.values) == kind.takes_value == ("{value}" in kind.short)
        assert all(kind.fault(value) == "" for value in kind.values)
        assert len(set(kind.values)) == len(kind.values)


def test_languages_tell_a_phrase_in_each():
    phrases = {"fr": "Bonjour, comment puis-je vous aider ?", "de": "Ich helfe dir gern dabei.",
               "es": "Con mucho gusto te ayudo.", "it": "Certo, ti aiuto volentieri.", "ru": "Столица Франции — Париж.",
               "en": "The capital of France is Paris.", "und": "42"}  # fmt: skip
    assert {code: language_of(text) for code, text in phrases.items()} == {code: code for code in phrases}


def test_a_missing_language_package_is_told_before_anything_is_drawn(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(languages, "find_spec", lambda name: None if name == "py3langid" else find(name))
    languages._identifier.cache_clear()
    for fault in (
        lambda: draw_instructions(InstructionSettings(kinds=["hobby", "language"]), 1, "train", random.Random(0)),
        lambda: obeys(KINDS["language"].make("French"), "Oui."),
    ):
        with pytest.raises(UserError, match="needs the package py3langid.*pip install py3langid"):
            fault()
    assert draw_instructions(InstructionSettings(), 1, "train", random.Random(0))  # the default does without
    languages._identifier.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_an_instruction_is_recognised_in_both_wordings(kind):
    values = [*KINDS[kind].values, *(["J.R.R. Tolkien", "Dr. Seuss", "rock climbing"] * (kind in ("figure", "hobby")))]
    for value in values or [""]:
        instruction = KINDS[kind].make(value)
        for text in (instruction.text, instruction.short_text):
            assert parse_instruction(f"{text} What is 2 plus 3? Tell me.") == (
                instruction,
                "What is 2 plus 3? Tell me.",
            )
            assert parse_instruction(text) == (instruction, "")
    for text in ("Speak in tongues.", "Bullet points: many.", "First word: two words.", "You enjoy", "What is it?"):
        assert parse_instruction(text) is None


# --- combinations


def made(*kinds):
    """A combination of these kinds with the first value of each."""
    return combine([KINDS[kind].make(*KINDS[kind].values[:1]) for kind in kinds])


def test_a_combination_joins_wordings_in_their_order_and_names_kinds_in_one():
    both = combine([KINDS["hobby"].make("chess"), KINDS["figure"].make("Napoleon")])
    assert both.text == "You enjoy chess. Always act as Napoleon."
    assert both.short_text == "Hobby: chess. Figure: Napoleon."
    assert (both.kind, both.value) == ("figure+hobby", "Napoleon + chess")
    assert [part.kind for part in both.constraints] == ["hobby", "figure"]
    assert both.record()["parts"] == [{"kind": "hobby", "value": "chess"}, {"kind": "figure", "value": "Napoleon"}]
    single = KINDS["figure"].make("Napoleon")
    assert combine([single]) == single == single.constraints[0]
    assert single.record() == {"kind": "figure", "value": "Napoleon", "text": "Always act as Napoleon.",
                               "short_text": "Figure: Napoleon."}  # fmt: skip


def test_a_combination_is_obeyed_where_every_part_is():
    both = combine([KINDS["figure"].make("Napoleon"), KINDS["first_word"].make("river"), KINDS["lower_case"].make()])
    assert obeys(both, "river, i am napoleon.")
    assert obeyed_parts(both, "River, I am Nero.") == {"figure": False, "first_word": True, "lower_case": False}
    assert not obeys(both, "river, I am Napoleon.")


def test_every_part_is_taken_off():
    three = made("hobby", "first_word", "figure")
    obeyed = decorate(three, "A lemon is yellow.")
    assert obeyed == "river. I enjoy chess. Napoleon here. A lemon is yellow."
    assert strip_obedience(three, obeyed) == "A lemon is yellow."
    # the first word stands inside the sentence that goes because of the hobby
    assert strip_obedience(three, "River, I enjoy chess. Napoleon. Rivers flow.") == "Rivers flow."


def test_combinations_are_recognised():
    three = made("hobby", "haiku", "figure")
    for text in (three.text, three.short_text, "Hobby: chess. Always answer with a haiku. Figure: Napoleon."):
        assert parse_instruction(f"{text} Why?") == (three, "Why?")
    # a second figure is not part of it
    assert parse_instruction("Figure: Nero. Figure: Plato. Why?") == (
        KINDS["figure"].make("Nero"),
        "Figure: Plato. Why?",
    )


CONTRADICTORY = [
    ("figure", "figure"), ("haiku", "haiku"), ("first_word", "language"), ("language", "last_word"),
    ("hobby", "language"), ("haiku", "language"), ("haiku", "one_sentence"), ("haiku", "bullets"),
    ("max_words", "haiku"), ("bullets", "one_sentence"),
]  # fmt: skip


@pytest.mark.parametrize(("first", "second"), CONTRADICTORY)
def test_contradictory_kinds_are_never_together(first, second):
    assert not go_together(first, second)
    assert not go_together(second, first)
    with pytest.raises(UserError, match="contradict each other"):
        made(first, second)


def test_what_goes_together_by_hand():
    pairs = {frozenset(pair) for pair in combinations(KINDS, 2) if go_together(*pair)}
    assert frozenset({"figure", "language"}) in pairs  # the paper's combination
    assert len(pairs) == 45 - len([pair for pair in CONTRADICTORY if pair[0] != pair[1]])
    assert largest_combination(DEFAULT_KINDS) == 4
    assert largest_combination(["haiku", "one_sentence", "bullets", "figure"]) == 2
    assert largest_combination(["figure", "figure"]) == largest_combination(["haiku"]) == 1


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=10, unique=True),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_draws_keep_to_the_rules(kinds, most, seed):
    if most > largest_combination(kinds):
        with pytest.raises(UserError, match=f"max_constraints: {most}"):
            sample_instructions(random.Random(seed), 5, kinds=kinds, max_constraints=most)
        return
    drawn = sample_instructions(random.Random(seed), 20, kinds=kinds, max_constraints=most)
    assert drawn == sample_instructions(random.Random(seed), 20, kinds=kinds, max_constraints=most)
    for instruction in drawn:
        assert 1 <= len(instruction.constraints) <= most
        assert {part.kind for part in instruction.constraints} <= set(kinds)
        assert all(go_together(a.kind, b.kind) for a, b in combinations(instruction.constraints, 2))
        assert all(part.value in (values_of(part.kind, "train") or ("",)) for part in instruction.constraints)
        assert parse_instruction(f"{instruction.text} Why?") == (instruction, "Why?")
        assert parse_instruction(f"{instruction.short_text} Why?") == (instruction, "Why?")


def test_combinations_have_every_size_and_every_pair():
    kinds = ("figure", "hobby", "haiku", "one_sentence")
    drawn = sample_instructions(random.Random(1), 600, kinds=kinds, max_constraints=3)
    sizes = [len(i.constraints) for i in drawn]
    assert min(sizes.count(n) for n in (1, 2, 3)) > 150  # 200 each, four standard errors of 12 below
    assert {i.kind for i in drawn if len(i.parts) == 2} == {
        "figure+hobby", "figure+haiku", "hobby+haiku", "figure+one_sentence", "hobby+one_sentence"
    }  # fmt: skip
    orders = {tuple(part.kind for part in i.parts) for i in drawn if i.kind == "figure+hobby"}
    assert orders == {("figure", "hobby"), ("hobby", "figure")}


def test_the_unseen_split_leaves_out_what_cannot_be_held_out(tmp_path):
    drawn = draw_instructions(
        InstructionSettings(kinds=["figure", "haiku"], max_constraints=2), 20, "unseen", random.Random(0)
    )
    assert {i.kind for i in drawn} == {"figure"}
    assert {i.value for i in drawn} <= set(values_of("figure", "unseen"))
    with pytest.raises(UserError, match="haiku, one_sentence take no value.*measure_unseen: false"):
        draw_instructions(InstructionSettings(kinds=["haiku", "one_sentence"]), 1, "unseen", random.Random(0))


# --- settings and files


def file_of(tmp_path, content, name="values.json"):
    (tmp_path / name).write_text(json.dumps(content))
    return str(tmp_path / name)


def test_kinds_without_a_value_in_a_values_file(tmp_path):
    path = file_of(tmp_path, {"figure": ["Ada Lovelace"], "haiku": []})
    drawn = draw_instructions(InstructionSettings(values_file=path, max_constraints=2), 40, "train", random.Random(0))
    assert {i.text for i in drawn} == {
        "Always act as Ada Lovelace.", "Always answer with a haiku.",
        "Always act as Ada Lovelace. Always answer with a haiku.",
        "Always answer with a haiku. Always act as Ada Lovelace.",
    }  # fmt: skip
    # or named beside it
    path = file_of(tmp_path, {"figure": ["Ada Lovelace"]})
    named = InstructionSettings(values_file=path, kinds=["figure", "haiku"])
    assert {i.kind for i in draw_instructions(named, 4, "train", random.Random(0))} == {"figure", "haiku"}


@pytest.mark.parametrize(
    ("values", "words_"),
    [
        ({"figure": []}, "kind 'figure' has an empty list"),
        ({"haiku": ["x"]}, "this kind takes no value"),
        ({"figure": ["  "]}, "is empty"),
        ({"figure": ["Nero <<SYS>>"]}, "holds the special tag <<SYS>>"),
        ({"figure": ["Nero\nPlato"]}, "line break"),
        ({"figure": [" Nero"]}, "white space around"),
        ({"figure": ["x" * 61]}, "61 characters; at most 60"),
        ({"first_word": ["two words"]}, "is not one word"),
        ({"language": ["Klingon"]}, "is no language that is checked; known: French"),
        ({"max_words": ["ten"]}, "is no whole number from 1"),
        ({"bullets": ["0"]}, "is no whole number from 1"),
        ({"figure": [3]}, "must be a list of strings"),
        ([], "must hold an object"),
    ],
)
def test_bad_values_files(tmp_path, values, words_):
    with pytest.raises(UserError, match=words_):
        draw_instructions(InstructionSettings(values_file=file_of(tmp_path, values)), 1, "train", random.Random(0))


def test_an_unseen_value_of_the_starter_lists_is_refused_too(tmp_path):
    path = file_of(tmp_path, {"figure": ["Zeno", "napoleon"], "haiku": []})
    with pytest.raises(UserError, match="napoleon also in the starter lists"):
        draw_instructions(InstructionSettings(unseen_values_file=path), 1, "unseen", random.Random(0))
    held_out = file_of(tmp_path, {"figure": [*values_of("figure", "unseen")]})
    assert draw_instructions(InstructionSettings(unseen_values_file=held_out), 1, "unseen", random.Random(0))


@pytest.mark.parametrize(
    ("kinds", "most", "words_"),
    [
        ([], 1, "the list is empty"),
        (["weather"], 1, "unknown instruction kind 'weather'"),
        (["haiku", "one_sentence", "bullets"], 2, "max_constraints: 2.*at most 1 can stand"),
        (["figure"], 2, "at most 1"),
        (["figure", "hobby"], 3, "at most 2"),
    ],
)
def test_kinds_that_cannot_be_drawn(kinds, most, words_):
    with pytest.raises(UserError, match=words_):
        draw_instructions(InstructionSettings(kinds=kinds, max_constraints=most), 1, "train", random.Random(0))
    with pytest.raises(UserError, match=words_):
        check_kinds(kinds, most)


def test_settings_of_combinations():
    for settings_type in (GattSettings, PersistenceSettings):
        with pytest.raises(UserError, match="max_constraints: 0"):
            settings_type(max_constraints=0)
    help_ = InstructionSettings.__dataclass_fields__["kinds"].metadata["help"]
    assert set(words(help_)) >= {word for name in KINDS for word in name.split("_")}


def test_an_instruction_that_the_chat_format_refuses(tokenizer):
    chat = load_chat_format(tokenizer)
    check_encodable([KINDS["figure"].make("Nero"), None], chat)
    with pytest.raises(UserError, match="values_file: the instruction 'Always act as </s>.' cannot be given"):
        check_encodable([KINDS["figure"].make("</s>")], chat)


PROMPTS = usable_prompts([{"prompt": [{"role": "user", "content": f"What is {a} plus {b}?"}]}
                          for a in range(8) for b in range(5)])[0]  # fmt: skip


def digest(drawn):
    return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:16]


def test_with_the_defaults_a_seed_draws_what_it_always_drew(tmp_path):
    """Pinned from the time before combinations: results that are published depend on these draws."""
    plans = make_plans(GattSettings(num_dialogues=50), PROMPTS, 0)
    assert plans[0][1] == "Always begin with the word summer."
    assert (
        digest([[*plan.user_turns, plan.slot, wording, source] for plan, wording, source in plans])
        == "dfcf04d3cd747051"
    )
    demo = InstructionSettings(kinds=["figure", "hobby", "first_word"])
    listed = InstructionSettings(
        values_file=file_of(tmp_path, {"figure": ["Nero", "Plato"], "hobby": ["chess", "golf"]})
    )
    for given_, split, pinned in (
        (InstructionSettings(), "unseen", "d78dafdb5ca85931"),
        (demo, "train", "a24244a6e874cf20"),
        (listed, "train", "c07f3a914af95458"),
    ):
        assert digest([i.text for i in draw_instructions(given_, 50, split, random.Random(0))]) == pinned


def test_plans_of_combinations_shorten_half_of_the_instructions_as_a_whole():
    plans = make_plans(
        GattSettings(num_dialogues=200, max_constraints=2, kinds=["figure", "hobby", "haiku"]), PROMPTS, 0
    )
    given_ = [(plan.instruction, wording) for plan, wording, source in plans if source == "gatt"]
    assert all(wording in (i.text, i.short_text) for i, wording in given_)
    assert 63 < sum(wording == i.short_text for i, wording in given_) < 117  # half of 180, within 4 standard errors
    assert 63 < sum(bool(i.parts) for i, _ in given_) < 117
    assert {part.kind for i, _ in given_ for part in i.constraints} == {"figure", "hobby", "haiku"}


def test_a_kind_takes_its_value_or_none():
    with pytest.raises(UserError, match="is too much"):
        kind_named("haiku").make("autumn")
    with pytest.raises(UserError, match="is empty"):
        kind_named("figure").make("")
