"""Many clients ask one server at once, some of them vanish: `python -m tests.tools.serving_load`, from a clone.

Starts `resps serve` with a tiny model, sends the requests, and compares every answer with the plain one. Exit status 1
when one was lost or differs, or the server's memory grew by more than 5% after the first fifth of the requests.
"""

import argparse
import http.client
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Load:
    """What clients got.

    Attributes:
        answered: requests with a whole answer.
        cut_off: requests whose client left.
        answers: (what was asked, most tokens) -> the answer.
        faults: what went wrong, in words.
    """

    answered: int = 0
    cut_off: int = 0
    answers: dict[tuple[str, int], str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def run_load(port: int, target: str, *, requests: int, clients: int, first: int = 0) -> Load:
    """Send `requests` from `clients` at once: every third is streamed, and every seventh client leaves."""
    load = Load()

    def one(number: int) -> None:
        content, most = ("abd", "gfkgfk", "mno", "ddd")[number % 4], 4 + number % 5 * 3
        body: dict[str, Any] = {
            "model": target,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": most,
        }
        streams, leaves = number % 3 == 0, number % 7 == 3
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body | {"stream": streams}), headers)
        if leaves:
            if streams:
                connection.getresponse().read(20)
            connection.close()
            load.cut_off += 1
            return
        answer = connection.getresponse()
        text = _text(answer.read().decode(), streams) if answer.status == 200 else None
        connection.close()
        if text is None or load.answers.setdefault((content, most), text) != text:
            load.faults.append(f"request {number}: status {answer.status}, {text!r}")
        else:
            load.answered += 1

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, range(first, first + requests)))
    return load


def _text(answer: str, streams: bool) -> str | None:
    """The text of an answer; `None` where it has no end or no figures."""
    if not streams:
        whole = json.loads(answer)
        return whole["choices"][0]["message"]["content"] if "metrics" in whole else None
    events = [json.loads(event.removeprefix("data: ")) for event in answer.split("\n\n") if event]
    if "metrics" not in events[-1]:
        return None
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events)


def _resident_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def main() -> int:
    from tests.tools.test_serve import Client, save_target

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=8)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_target(Path(folder) / "target")
        target = f"{folder}/target"
        command = [sys.executable, "-m", "resps", "serve", target, "--port", "0", "--device", "cpu"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            port = int(server.stdout.readline().split("/v1")[0].rpartition(":")[2])
            client, fifth = Client(port, Path(folder)), args.requests // 5
            begun = run_load(port, target, requests=fifth, clients=args.clients)
            before = _resident_mib(server.pid)
            rest = run_load(port, target, requests=args.requests - fifth, clients=args.clients, first=fifth)
            after = _resident_mib(server.pid)
            print(server_figures := client.metrics())
            server.terminate()
        faults = begun.faults + rest.faults
        answers = begun.answers | rest.answers
        faults += [
            f"{asked}: {text!r}"
            for asked, text in answers.items()
            if text != client.plain(asked[0], max_new_tokens=asked[1])
        ]
    answered, cut_off = begun.answered + rest.answered, begun.cut_off + rest.cut_off
    print(
        f"{answered} answered, {cut_off} left, {len(answers)} different ones; {before:.0f} MiB, then {after:.0f} MiB"
    )
    print(*faults, sep="\n")
    is_flat = after < 1.05 * before
    return int(bool(faults) or not is_flat or answered + cut_off != args.requests or not server_figures)


if __name__ == "__main__":
    sys.exit(main())
