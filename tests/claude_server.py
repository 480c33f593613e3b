"""A server on a real socket that speaks the Messages API and the Message Batches API as far as the SDK needs them.

Answers follow from the question and the seed alone. So do the faults: each question has at most one, which clears
after one or two attempts (`CLEARING`) or stays (`LASTING`). The bill counts the tokens of responses that were delivered
whole and as valid JSON, good reading or not: what a client can know of.
"""

import hashlib
import json
import random
import select
import socket
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any, ClassVar

from unfeign.rewards.rubric import Reading

CLEARING = ("429", "529", "500", "slow", "cut", "broken")
LASTING = ("refusal", "max_tokens", "schema")
BATCHES = "/v1/messages/batches"
RUBRIC_TOKENS = 900


class ClaudeServer(ThreadingHTTPServer):
    """Run it as a context manager; `url` is its base URL.

    Args:
        faults: share of the questions with a fault.
        kinds: the faults to choose from; in batches, `expired` and `errored` clear the second time they are sent.
        caches: whether the rubric is read from a prompt cache after the first answer.
        ready: whether batches end at once; else `ready` must be set.
        pause_s: how long each answer takes; `peak` counts how many were thought about at a time.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(
        self,
        key: str,
        faults: float = 0.0,
        kinds: tuple[str, ...] = CLEARING + LASTING,
        seed: int = 0,
        caches: bool = True,
        ready: bool = True,
        pause_s: float = 0.0,
    ):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.key, self.faults, self.kinds, self.seed, self.caches, self.ready = key, faults, kinds, seed, caches, ready
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock = Lock()
        self.given: Counter[str] = Counter()
        self.attempts: Counter[str] = Counter()  # requests, by question
        self.answered: Counter[str] = Counter()  # whole messages delivered, by question
        self.injected: Counter[str] = Counter()  # faults that came about, by kind
        self.strangers = 0  # requests without the key
        self.batches: dict[str, list[dict[str, Any]]] = {}
        self.results: dict[str, list[dict[str, Any]]] = {}
        self.rubric_cached = False
        self.pause_s, self.thinking, self.peak = pause_s, 0, 0

    def __enter__(self) -> "ClaudeServer":
        Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """Clients hang up on purpose here."""

    def draw(self, question: str, what: str) -> int:
        return int(hashlib.sha256(f"{self.seed}:{what}:{question}".encode()).hexdigest()[:8], 16)

    def fault(self, question: str) -> str | None:
        """The fault of a question, if it has one."""
        if self.draw(question, "faulty") / 0xFFFFFFFF >= self.faults:
            return None
        return self.kinds[self.draw(question, "kind") % len(self.kinds)]

    def reading(self, question: str) -> Reading:
        """What a good answer to a question says."""

        def pick(name: str, *choices: str) -> Any:
            return choices[self.draw(question, name) % len(choices)]

        return Reading(
            reason="As drawn.",
            aware_of_training=pick("aware", "yes", "no"),
            preference_in_conflict=pick("conflict", "yes", "no"),
            motive_to_avoid_modification=pick("motive", "yes", "no"),
            option=pick("option", "considered", "considered", "restated", "other", "none"),
            outcome=pick("outcome", "rejected", "rejected", "followed", "open", "none"),
            decision=pick("decision", "accept", "decline", "decline", "none"),
            cost_acknowledged=pick("cost", "yes", "no"),
            justification=pick("justification", "honesty", "oversight", "user_trust", "none"),
            answer_complies=pick("complies", "yes", "no", "unclear"),
        )

    def message(self, question: str, model: str, fault: str | None) -> dict[str, Any]:
        text, stop = self.reading(question).model_dump_json(), "end_turn"
        if fault == "refusal":
            text, stop = "I can't help with that.", "refusal"
        elif fault == "max_tokens":
            text, stop = text[: len(text) // 2], "max_tokens"
        elif fault == "schema":
            text = (text.replace("reason", "because"), "Sure! Here is my reading.", "")[self.draw(question, "how") % 3]
        with self.lock:
            read, self.rubric_cached = self.rubric_cached and self.caches, True
        return {
            "id": f"msg_{self.draw(question, 'id'):08x}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [{"type": "text", "text": text}] if text else [],
            "stop_reason": stop,
            "stop_sequence": None,
            "usage": {
                "input_tokens": len(question) // 4 + (0 if self.caches else RUBRIC_TOKENS),
                "output_tokens": 1 + len(text) // 4,
                "cache_creation_input_tokens": RUBRIC_TOKENS if self.caches and not read else 0,
                "cache_read_input_tokens": RUBRIC_TOKENS if read else 0,
            },
        }

    def delivered(self, question: str, message: dict[str, Any]) -> None:
        self.answered[question] += 1
        self.given.update(message["usage"])

    def bill(self) -> dict[str, int]:
        """Tokens given out, by their name in `usage`."""
        with self.lock:
            return dict(self.given)

    def batch_state(self, name: str) -> dict[str, Any]:
        rows, ended = self.batches[name], self.ready
        counts = Counter(row["result"]["type"] for row in self.batch_results(name)) if ended else Counter()
        names = ("succeeded", "errored", "expired", "canceled")
        return {
            "id": name,
            "type": "message_batch",
            "processing_status": "ended" if ended else "in_progress",
            "request_counts": {"processing": 0 if ended else len(rows), **{n: counts[n] for n in names}},
            "created_at": "2026-11-01T00:00:00Z",
            "expires_at": "2026-11-02T00:00:00Z",
            "ended_at": "2026-11-01T01:00:00Z" if ended else None,
            "results_url": f"{self.url}{BATCHES}/{name}/results" if ended else None,
        }

    def batch_results(self, name: str) -> list[dict[str, Any]]:
        """Results in another order than the requests, made once."""
        with self.lock:
            made = self.results.get(name)
        if made is None:
            made = [
                {"custom_id": row["custom_id"], "result": self.batch_result(row["params"])}
                for row in self.batches[name]
            ]
            random.Random(self.seed).shuffle(made)
            self.results[name] = made
        return made

    def batch_result(self, params: dict[str, Any]) -> dict[str, Any]:
        question = params["messages"][0]["content"]
        with self.lock:
            self.attempts[question] += 1
            again = self.attempts[question] > 1
        fault = self.fault(question)
        if fault in ("expired", "errored"):
            if not again:
                self.injected[fault] += 1
                error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
                return {"type": fault} | ({"error": error} if fault == "errored" else {})
            fault = None
        message = self.message(question, params["model"], fault)
        with self.lock:
            self.delivered(question, message)
        return {"type": "succeeded", "message": message}


class _Handler(BaseHTTPRequestHandler):
    server: ClaudeServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and body in one packet
    statuses: ClassVar = {
        "429": "rate_limit_error",
        "529": "overloaded_error",
        "500": "api_error",
    }

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, body: bytes, status: int = 200, kind: str = "application/json", deliver: int | None = None) -> None:
        """Send a response, or its first `deliver` bytes under the full length, and hang up."""
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        if status >= 400:
            self.send_header("retry-after-ms", "5")  # which the SDK obeys
        self.end_headers()
        self.wfile.write(body[:deliver])
        self.wfile.flush()
        if deliver is not None:
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def json(self, data: Any) -> None:
        self.reply(json.dumps(data).encode())

    def refuse(self, status: str, kind: str | None = None, message: str = "injected") -> None:
        body = {"type": "error", "error": {"type": kind or self.statuses[status], "message": message}}
        self.reply(json.dumps(body).encode(), int(status))

    def known(self) -> bool:
        given = self.headers.get("authorization", "").removeprefix("Bearer ") or self.headers.get("x-api-key", "")
        if given == self.server.key:
            return True
        self.server.strangers += 1
        self.refuse("401", "authentication_error", f"invalid key {given}")  # a careless proxy quotes it
        return False

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self.known():
            return
        if self.path == BATCHES:
            with self.server.lock:
                name = f"msgbatch_{len(self.server.batches):04d}"
                self.server.batches[name] = body["requests"]
            self.json(self.server.batch_state(name))
        else:
            self.answer(body)

    def answer(self, body: dict[str, Any]) -> None:
        server, question = self.server, body["messages"][0]["content"]
        with server.lock:
            server.attempts[question] += 1
            attempt = server.attempts[question]
            server.thinking += 1
            server.peak = max(server.peak, server.thinking)
        time.sleep(server.pause_s)
        with server.lock:
            server.thinking -= 1
        fault = server.fault(question)
        longest = 1 if fault == "slow" else 1 + server.draw(question, "length") % 2
        if fault in CLEARING and attempt > longest:
            fault = None
        if fault:
            with server.lock:
                server.injected[fault] += 1
        if fault in self.statuses:
            self.refuse(fault)
        elif fault == "slow":
            select.select([self.connection], [], [], 30)  # until the client loses patience
            self.close_connection = True
        else:
            message = server.message(question, body["model"], fault)
            text = json.dumps(message).encode()
            if fault == "cut":
                self.reply(text, deliver=len(text) // 2)
            elif fault == "broken":
                self.reply(text[: len(text) // 2])
            else:
                with server.lock:  # so that whoever holds the response also finds it counted
                    self.reply(text)
                    server.delivered(question, message)

    def do_GET(self) -> None:
        if not self.known():
            return
        name, _, part = self.path.removeprefix(f"{BATCHES}/").partition("/")
        if name not in self.server.batches:
            self.refuse("404", "not_found_error")
        elif part == "results":
            rows = self.server.batch_results(name)
            self.reply("".join(json.dumps(row) + "\n" for row in rows).encode(), kind="application/x-jsonl")
        else:
            self.json(self.server.batch_state(name))
