"""The reply engines of `gatt.synth`: dialogues in which each token is computed once, over a session with a kept cache
(`DialogueEngine`), and contexts that any sampling engine answers one by one (`ContextEngine`).

A dialogue's ids are the concatenation of increments, `prompt_1, reply_1, prompt_2, reply_2, ...`: prompt_k is what the
chat format puts between the end of reply k-1 and reply k, so with the replies as the format encodes them the
concatenation is `encode_prompt` of the whole dialogue. Sampled replies keep their sampled ids instead: re-encoding
their text may give other ids for the same text, and a policy should read back what it wrote.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from configs.chat import ChatFormat
from configs.errors import UserError
from configs.sampling_settings import SamplingSettings
from gatt.synth import Draft
from gatt.transform import Message
from rlhf.sampler import position_limit
from rlhf.samples import Engine, Prompt, SampleBatch, before_stop_string
from rlhf.sessions import DialogueSession


class Increments:
    """The ids that the chat format puts in front of each reply."""

    def __init__(self, chat_format: ChatFormat):
        self.chat_format = chat_format
        self._stub: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        encoded = chat_format.encode_dialogue(self._stub)
        # A template may put something behind the reply's end token (a line break); that belongs to the next prompt.
        self._end = max(t for t, mine in enumerate(encoded.response_mask) if mine) + 1
        self._prefix = encoded.input_ids[: self._end]
        self.end_id = self._prefix[-1]
        if self.end_id not in chat_format.stop_ids:
            raise UserError("this chat format does not end a reply with a stop token; multi-turn sampling needs one")

    def first(self, messages: Sequence[Message]) -> list[int]:
        """Turn 1: the whole prompt of (system?), user."""
        return self.chat_format.encode_prompt(list(messages))

    def next(self, user_text: str) -> list[int]:
        """Turn k > 1: the ids between the end token of reply k-1 and reply k."""
        ids = self.chat_format.encode_prompt([*self._stub, {"role": "user", "content": user_text}])
        if ids[: self._end] != self._prefix:
            raise UserError(
                "this chat format rewrites earlier turns once one follows; multi-turn sampling needs another"
            )
        return ids[self._end :]


@dataclass
class _Row:
    """One dialogue of the engine. `length`: its tokens up to the prompt of the current turn, that prompt included."""

    turn: int = 0
    length: int = 0
    last_prompt_id: int = 0
    reply: list[int] = field(default_factory=list)
    drafts: dict[str, list[int]] = field(default_factory=dict)  # of the current turn: text -> ids


@dataclass(frozen=True)
class _Feed:
    """What a row is fed next; with `back`, its last reply is taken back first and `ids` follow the same prompt."""

    ids: list[int]
    back: bool
    turn: int
    length: int  # tokens of the dialogue once `ids` are fed


class DialogueEngine:
    """`gatt.synth.Reply` over one policy: every prompt and every kept reply is computed once.

    A row that is not asked for has ended for good and leaves the batch. A row asked for the same turn again takes its
    draft back. Only where an earlier draft than the last is kept (a judge's choice) are that reply's tokens fed a
    second time. The rows of the first call are the dialogues of the engine.
    """

    def __init__(
        self, model: Any, chat_format: ChatFormat, pad_id: int, settings: SamplingSettings, max_length: int, seed: int
    ):
        self.increments = Increments(chat_format)
        self.chat_format, self.settings, self.seed = chat_format, settings, seed
        limit = position_limit(model)
        self.max_length = min(max_length, limit) if limit else max_length
        # The session closes a reply that was cut at its limit with the first stop id: it must be the format's own.
        self.stop_ids = sorted(chat_format.stop_ids, key=lambda i: i != self.increments.end_id)
        self.session = DialogueSession(model, pad_id, self.stop_ids, self.max_length)
        self.places: list[int] = []  # the dialogue in each place of the session
        self.state: dict[int, _Row] = {}
        self.calls = 0

    def __call__(self, rows: list[int], contexts: list[list[Message]]) -> list[Draft]:
        """One draft a row: decoded text, or why there is none."""
        feeds = {row: self._feed(row, context) for row, context in zip(rows, contexts, strict=True)}
        # One more than the reply: where it is cut at its limit, its end token is added to the history.
        fits = [r for r in rows if feeds[r].length + self.settings.max_new_tokens + 1 <= self.max_length]
        if fits:
            self._advance(fits, feeds)
        drafts = {row: self._draft(row) for row in fits}
        return [drafts.get(row, Draft("", "too_long")) for row in rows]

    def _feed(self, row: int, context: list[Message]) -> _Feed:
        state = self.state.get(row)
        turn = sum(message["role"] == "user" for message in context)
        if state is None and turn == 1 and self.calls == 0:
            ids = self.increments.first(context)
            return _Feed(ids, False, 1, len(ids))
        if state is not None and turn == state.turn:
            return _Feed([], True, turn, state.length)
        if state is not None and turn == state.turn + 1 and context[-2]["content"] in state.drafts:
            kept = state.drafts[context[-2]["content"]]
            closed = kept if kept[-1] in self.stop_ids else [*kept, self.increments.end_id]
            increment = self.increments.next(context[-1]["content"])
            length = state.length + len(closed) + len(increment)
            if kept is state.reply:  # it stands in the session already
                return _Feed(increment, False, turn, length)
            return _Feed(closed + increment, True, turn, length)
        raise ValueError(f"dialogue {row}: its context does not follow from the replies that it was given")

    def _advance(self, rows: list[int], feeds: dict[int, _Feed]) -> None:
        if self.places and rows != self.places:
            self.session.keep([self.places.index(row) for row in rows])
        self.places = list(rows)
        back = [place for place, row in enumerate(rows) if feeds[row].back]
        if back:
            self.session.rewind(back, [self.state[row].reply for row in rows])
        new_ids = [
            [self.state[row].last_prompt_id, *feeds[row].ids] if feeds[row].back else feeds[row].ids for row in rows
        ]
        # The session's own seeds repeat when the number of its dialogues changes; a seed of its own for each call does
        # not.
        seed = random.Random(f"{self.seed}/{self.calls}").getrandbits(62)
        replies = self.session.reply(new_ids, self.settings, seed)
        self.calls += 1
        for row, fed, reply in zip(rows, new_ids, replies, strict=True):
            state = self.state.setdefault(row, _Row())
            if feeds[row].turn != state.turn:
                state.drafts = {}
            state.turn, state.length = feeds[row].turn, feeds[row].length
            state.last_prompt_id, state.reply = fed[-1], reply

    def _draft(self, row: int) -> Draft:
        state = self.state[row]
        text = self.chat_format.decode_response(state.reply)
        state.drafts[text] = state.reply
        return Draft(text, "" if state.reply[-1] in self.stop_ids else "unfinished")


class ContextEngine:
    """`gatt.synth.Reply` over any sampling engine: each context is a prompt of its own, and nothing is kept between
    calls.

    For contexts of one turn, and for whole dialogues where something else than this process samples: servers keep
    prefixes themselves. A draft that the engine failed on may be drawn again; UserError where that is a larger share of
    a call than `max_failed_share`.
    """

    def __init__(
        self,
        engine: Engine,
        chat_format: ChatFormat,
        settings: SamplingSettings,
        max_length: int,
        seed: int,
        max_failed_share: float = 0.0,
    ):
        self.engine, self.chat_format, self.settings = engine, chat_format, settings
        limit = position_limit(engine)
        self.max_length = min(max_length, limit) if limit else max_length
        self.seed, self.calls, self.max_failed_share = seed, 0, max_failed_share

    def __call__(self, rows: list[int], contexts: list[list[Message]]) -> list[Draft]:
        """One draft a row: decoded text, or why there is none."""
        prompts = [Prompt(context, self.chat_format.encode_prompt(context)) for context in contexts]
        room = self.max_length - self.settings.max_new_tokens - 1
        fits = [i for i, prompt in enumerate(prompts) if len(prompt.ids) <= room]
        drafts = [Draft("", "too_long")] * len(rows)
        if fits:
            seed = random.Random(f"{self.seed}/{self.calls}").getrandbits(62)
            batch = self.engine.sample([prompts[i] for i in fits], 1, self.settings, seed)
            if len(batch.errors) > self.max_failed_share * len(fits):
                place, reason = next(iter(batch.errors.items()))
                raise UserError(
                    f"{len(batch.errors)} of {len(fits)} replies could not be sampled, more than max_failed_share: "
                    f"{self.max_failed_share}; the first, of dialogue {rows[fits[place]]}: {reason}"
                )
            for place, i in enumerate(fits):
                drafts[i] = self._draft(batch, place)
        self.calls += 1
        return drafts

    def _draft(self, batch: SampleBatch, place: int) -> Draft:
        if place in batch.errors:
            return Draft("", "failed")
        text = before_stop_string(
            self.chat_format.decode_response(batch.response_ids[place]), self.settings.stop_strings
        )
        return Draft(text, "" if batch.finish_reasons[place] == "stop" else "unfinished")
