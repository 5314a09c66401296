"""A small OpenAI-like server on loopback whose answers a test decides: for failures that a real one rarely shows."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = tuple[int, object]  # status and JSON value (bytes are sent as they are)


class Loopback:
    """`answer(path, body, nth)` gives the answer to the nth POST (from 0); requests are recorded as (path, body)."""

    def __init__(self, answer: Callable[[str, dict, int], Answer], models: Answer) -> None:
        self.answer, self.models = answer, models
        self.requests: list[tuple[str, dict]] = []
        self.headers: list[dict[str, str]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    @contextmanager
    def running(self) -> Iterator[str]:
        """Serve; gives the address without a path."""
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                served.headers.append({name.lower(): value for name, value in self.headers.items()})
                self.reply(*served.models)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with served.lock:
                    nth = len(served.requests)
                    served.requests.append((self.path, body))
                    served.at_once += 1
                    served.most_at_once = max(served.at_once, served.most_at_once)
                try:
                    answer = served.answer(self.path, body, nth)
                finally:  # before the reply: the client's next request may come sooner than what stands behind it
                    with served.lock:
                        served.at_once -= 1
                with suppress(BrokenPipeError):  # the client has stopped waiting
                    self.reply(*answer)

            def reply(self, status: int, value: object) -> None:
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                if status in (301, 307):
                    self.send_header("location", "http://127.0.0.1:9/v1")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def listing(*names: str, **extra: object) -> Answer:
    return 200, {"object": "list", "data": [{"id": name, "object": "model", **extra} for name in names]}


def hang(seconds: float) -> Answer:
    time.sleep(seconds)
    return 200, {}


def token_ids_answer(body: dict) -> Answer:
    """As vLLM answers /v1/completions: n choices of the ids 5, 6, ..., closed by the stop id, with log-probs."""
    ids = [[10 + j, 20, body["stop_token_ids"][-1]][-body["max_tokens"] :] for j in range(body.get("n", 1))]
    return 200, {
        "choices": [
            {
                "index": j,
                "text": "not to be read",
                "finish_reason": "stop",
                "stop_reason": None,
                "token_ids": mine,
                "logprobs": {"tokens": [f"token_id:{i}" for i in mine], "token_logprobs": [-0.5 - j] * len(mine)},
            }
            for j, mine in enumerate(ids)
        ],
        "usage": {"prompt_tokens": len(body["prompt"])},
    }


def text_answer(text: str, reason: str = "stop", **extra: object) -> Answer:
    """As a chat endpoint without ids answers, one choice."""
    message = {"role": "assistant", "content": text}
    return 200, {"choices": [{"index": 0, "finish_reason": reason, "message": message, **extra}]}
