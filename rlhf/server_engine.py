"""Sampling from an OpenAI-compatible server (vLLM, SGLang, `transformers serve`); the policy's weights stay there.

Connecting tries the dialects of rlhf/server_protocol.py once, with one token each. A prompt whose requests fail after
all retries, or whose answers are nonsense, is recorded in `SampleBatch.errors`; a server that is down, or refuses the
key or the model's name, is one UserError.
"""

import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import openai

from configs.chat import ChatFormat
from configs.engine_settings import EngineSettings
from configs.errors import UserError
from configs.sampling_settings import SamplingSettings
from rlhf.continuous_batching import plain
from rlhf.draw import sample_seeds
from rlhf.sampler import check_lengths, position_limit
from rlhf.samples import Prompt, SampleBatch
from rlhf.server_protocol import DIALECTS, Choice, Garbage, check_dialect, encode_choice, read_choices, request

logger = logging.getLogger(__name__)

KEY_VARIABLE = "SAMPLING_SERVER_API_KEY"
FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0  # seconds before nonsense is asked for again, doubled each time
PROBE_SECONDS, PROBE_RETRIES = 60.0, 2  # bounds of one trial request
SHOWN = 200  # characters of a server's words in an error message
TRIAL = [{"role": "user", "content": "Say yes."}]


class Server:
    """The engine.

    Args:
        settings: where the server is and how patient to be.
        model_name: the policy's name, which is the model's name there unless settings or the server say otherwise.
        config: the policy's configuration; its positions are lowered to the length that the server serves.
        sampling: settings of the trial request.
    """

    name = "server"
    follows_seeds = False  # seeds go along where requests are one a sample; what a server makes of them is its matter

    def __init__(
        self, settings: EngineSettings, model_name: str, chat: ChatFormat, config: Any, sampling: SamplingSettings
    ) -> None:
        self.settings, self.chat, self.config = settings, chat, config
        self.client = _client(settings)
        self.url = str(self.client.base_url).rstrip("/")
        limits = self._models()
        self.model = settings.server_model or (next(iter(limits)) if len(limits) == 1 else model_name)
        if served := limits.get(self.model):
            text = config.get_text_config(decoder=True)
            text.max_position_embeddings = min(served, position_limit(self) or served)
        self.dialect, self.gives_n, exact = self._try(list(limits), sampling)
        logger.info(
            "sampling from %s: model %s, dialect %s, %s, %s", self.url, self.model, self.dialect,
            "n samples a request" if self.gives_n else "one sample a request",
            "token ids" if exact else "text without token ids",
        )  # fmt: skip
        if self.dialect == "transformers":
            logger.warning(
                "a transformers server started with --continuous-batching draws every request by the settings of its "
                "first; start it again where they have changed"
            )

    def sample(
        self, prompts: Sequence[Prompt], k: int, settings: SamplingSettings, seed: int | Sequence[int] = 0
    ) -> SampleBatch:
        """As `Engine.sample`; failed prompts are in `errors`. UserError where the server answers none any more."""
        check_dialect(self.dialect, settings)
        check_lengths(self, [len(prompt.ids) for prompt in prompts], settings.max_new_tokens)
        count = len(prompts) * k
        seeds = sample_seeds(seed, count) if isinstance(seed, int) else [int(s) for s in seed]
        together = self.gives_n and settings.temperature > 0.0  # vLLM refuses n > 1 for greedy samples, all equal
        jobs = [p * k for p in range(len(prompts))] if together else list(range(count))  # the first sample of each
        choices: list[Choice | None] = [None] * count
        errors: dict[int, str] = {}
        down: set[int] = set()

        def ask(i: int) -> None:
            p, n = i // k, k if together else 1
            if p in errors:
                return
            try:
                choices[i : i + n] = self._ask(prompts[p], n, settings, None if together else seeds[i])
            except (Garbage, openai.APIError) as error:
                if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError | openai.NotFoundError):
                    raise UserError(f"server_url: {self.url} refuses what it took before: {_words(error)}") from error
                if _is_down(error):
                    down.add(p)
                errors[p] = _words(error)

        pool = ThreadPoolExecutor(self.settings.server_concurrency)
        try:
            list(pool.map(ask, jobs))
        finally:
            pool.shutdown(cancel_futures=True)  # at an error: nothing that has not begun is sent any more
        if prompts and len(down) == len(prompts):
            raise UserError(f"server_url: {self.url} answers no more ({errors[0]}); start it and run this again")
        return self._batch([None if i // k in errors else c for i, c in enumerate(choices)], k, settings, seeds, errors)

    def _batch(
        self,
        choices: list[Choice | None],
        k: int,
        settings: SamplingSettings,
        seeds: list[int],
        errors: dict[int, str],
    ) -> SampleBatch:
        stop_ids = self._stop_ids(settings)
        ids = [
            [] if c is None else encode_choice(c, self.chat.tokenizer, stop_ids, settings.stop_strings) for c in choices
        ]
        # Servers differ in whether they report the model's log-probs or the tempered ones: known where both are equal.
        known = [
            list(c.logprobs) if c and c.logprobs and len(c.logprobs) == len(own) and plain(settings) else []
            for c, own in zip(choices, ids, strict=True)
        ]
        return SampleBatch(
            ids,
            known,
            [list(row) for row in known],
            ["error" if c is None else c.reason for c in choices],
            seeds,
            k,
            exact_ids=all(c is None or c.ids is not None for c in choices),
            errors=dict(sorted(errors.items())),
        )

    def _stop_ids(self, settings: SamplingSettings) -> list[int]:
        return [*settings.stop_token_ids, *self.chat.stop_ids]

    def _ask(self, prompt: Prompt, n: int, settings: SamplingSettings, seed: int | None) -> list[Choice]:
        """n responses. The client retries what HTTP calls a failure; answers that make no sense are asked for again."""
        wait = FIRST_WAIT
        for attempt in range(self.settings.server_max_retries + 1):
            try:
                choices, _ = self._send(self.client, self.dialect, prompt, n, settings, seed)
                if len(choices) != n:
                    raise Garbage(f"{len(choices)} choices where {n} were asked for")
                return choices
            except Garbage:
                if attempt == self.settings.server_max_retries:
                    raise
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)
        raise AssertionError("the last attempt returns or raises")

    def _send(
        self, client: Any, dialect: str, prompt: Prompt, n: int, settings: SamplingSettings, seed: int | None
    ) -> tuple[list[Choice], Any]:
        """The choices of one request, and the whole answer."""
        tokenizer, stop_ids = self.chat.tokenizer, self._stop_ids(settings)
        path, body = request(dialect, self.model, prompt, n, settings, stop_ids, tokenizer.pad_token_id, seed)
        try:
            answer = client.post(path, body=body, cast_to=object)
        except (ValueError, openai.APIResponseValidationError) as error:
            raise Garbage("the answer is not JSON") from error
        choices = read_choices(answer, len(tokenizer), settings.max_new_tokens)
        limit = position_limit(self)
        for choice in choices:
            length = len(prompt.ids) + len(encode_choice(choice, tokenizer, stop_ids, settings.stop_strings))
            if limit is not None and length > limit:
                raise Garbage(f"a text of {length} tokens with its prompt, where the policy has {limit} positions")
        return choices, answer

    def _models(self) -> dict[str, int | None]:
        """The names that the server lists, with the longest sequence each serves; none where it cannot list them."""
        try:
            probe = self.client.with_options(max_retries=0, timeout=min(self.settings.server_timeout, PROBE_SECONDS))
            answer = probe.get("/models", cast_to=object)
        except openai.APIConnectionError as error:
            raise UserError(
                f"server_url: no server answers at {self.url} ({_words(error)}); start it, such as with "
                "`vllm serve MODEL` or `transformers serve MODEL`, or check address and port"
            ) from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._key_error(error) from error
        except (openai.APIError, ValueError):
            return {}  # `transformers serve` fails to list where there is no Hub cache; the trial decides
        rows = answer.get("data") if isinstance(answer, dict) else None
        found = [row for row in rows or [] if isinstance(row, dict) and isinstance(row.get("id"), str)]
        lengths = [(row["id"], row.get("max_model_len")) for row in found]
        return {name: length if isinstance(length, int) and length > 0 else None for name, length in lengths}

    def _try(self, listed: list[str], sampling: SamplingSettings) -> tuple[str, bool, bool]:
        """The first dialect that works, whether it gives n samples a request, and whether it gives token ids."""
        prompt = Prompt(TRIAL, self.chat.encode_prompt(TRIAL))
        settings = replace(sampling, max_new_tokens=1)
        client = self.client.with_options(
            max_retries=min(self.settings.server_max_retries, PROBE_RETRIES),
            timeout=min(self.settings.server_timeout, PROBE_SECONDS),
        )
        refusals: list[str] = []
        for dialect in DIALECTS[self.settings.server_api]:
            for n in (2, 1) if settings.temperature > 0.0 else (1,):
                try:
                    choices, answer = self._send(client, dialect, prompt, n, settings, 0 if n == 1 else None)
                except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
                    raise self._key_error(error) from error
                except (Garbage, openai.APIError) as error:
                    refusals.append(f"{dialect}: {_words(error)}")
                    continue
                if dialect != "completions":
                    self._check_template(answer, len(prompt.ids))
                return dialect, len(choices) == 2, choices[0].ids is not None
        names = f"; it lists {', '.join(listed[:5])}" if listed else ""
        raise UserError(
            f"server_url: {self.url} gives no sample of server_model {self.model!r}{names}. It answered: "
            + "; ".join(dict.fromkeys(refusals))
        )

    def _check_template(self, answer: Any, length: int) -> None:
        """UserError where the server's chat template reads the trial prompt as another number of tokens than ours."""
        usage = answer.get("usage")
        seen = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if isinstance(seen, int) and seen != length:
            raise UserError(
                f"server_url: {self.url} reads a prompt of {length} tokens as {seen}: its chat template is not the "
                "policy's. Serve the policy's own folder, or use a server that takes token ids (server_api completions)"
            )

    def _key_error(self, error: Exception) -> UserError:
        given = "refuses the key in" if os.environ.get(KEY_VARIABLE) else "wants a key: set"
        return UserError(f"server_url: {self.url} {given} {KEY_VARIABLE} ({_words(error)})")


def _client(settings: EngineSettings) -> openai.OpenAI:
    """The client. A key goes to https or to this machine only, and no redirect is followed with it."""
    url = str(settings.server_url)
    parts = urlsplit(url)
    host, key = str(parts.hostname), os.environ.get(KEY_VARIABLE)
    local = _is_loopback(host)
    if key and parts.scheme == "http" and not local:
        raise UserError(
            f"server_url: {KEY_VARIABLE} would travel to {host} unencrypted; use https, or a tunnel that ends on "
            "127.0.0.1"
        )
    # The user's account at OpenAI, which the client would take from the environment, is no business of other servers.
    headers: dict[str, Any] = {"OpenAI-Organization": openai.Omit(), "OpenAI-Project": openai.Omit()}
    return openai.OpenAI(
        base_url=url if parts.path.strip("/") else url.rstrip("/") + "/v1",
        api_key=key or "none",  # the client wants one, and would take OPENAI_API_KEY
        timeout=settings.server_timeout,
        max_retries=settings.server_max_retries,
        default_headers=headers,
        # This machine is reached without a proxy, whatever the environment names.
        http_client=openai.DefaultHttpxClient(follow_redirects=False, trust_env=not local),
    )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_down(error: Exception) -> bool:
    return isinstance(error, openai.APIConnectionError) and not isinstance(error, openai.APITimeoutError)


def _words(error: Exception) -> str:
    """An error in a few words, on one line: the status and what the server says."""
    if isinstance(error, openai.APITimeoutError):
        return "no answer within server_timeout"
    if isinstance(error, openai.APIStatusError):
        said = error.body if error.body is not None else error.response.text
        if isinstance(said, dict):
            said = said.get("message") or said.get("detail") or said
        text = f"status {error.status_code}: {said}"
    else:
        text = str(error.__cause__ or error) if isinstance(error, openai.APIConnectionError) else str(error)
    text = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
