"""guidellm's load generator against a running rill: every request of a short run succeeds, streamed and with its usage.

usage: guidellm_client.py BASE_URL      (BASE_URL without /v1; prints a transcript; exit 0 if everything held)
"""
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

BASE = sys.argv[1]
REQUESTS = 12
TOKENS = 8


def start(route, folder):
    """The program at work on one API, and where it will write its report."""
    data, report = pathlib.Path(folder, "data.jsonl"), pathlib.Path(folder, f"{route}.json")
    lines = [{"prompt": f"Question {i}: name a colour.", "output_tokens_count": TOKENS} for i in range(REQUESTS)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = {"target": BASE, "data": data, "rate-type": "concurrent", "rate": 4, "max-requests": REQUESTS,
             "output-path": report}  # fmt: skip
    command = [sys.executable, "-m", "guidellm", "benchmark", "run", "--disable-progress"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    environment = {**os.environ, "GUIDELLM__PREFERRED_ROUTE": route}
    return subprocess.Popen(command, env=environment), report


class GuideLLM(unittest.TestCase):
    def test_every_request_succeeds(self):
        with tempfile.TemporaryDirectory() as folder:
            runs = {route: start(route, folder) for route in ("chat_completions", "text_completions")}
            for route, (process, report) in runs.items():
                with self.subTest(route):
                    self.assertEqual(process.wait(timeout=120), 0)
                    (benchmark,) = json.loads(report.read_text())["benchmarks"]
                    totals = benchmark["request_totals"]
                    print(">>>", route, totals, flush=True)
                    self.assertEqual((totals["successful"], totals["total"]), (REQUESTS, REQUESTS))
                    for request in benchmark["requests"]["successful"]:
                        self.assertEqual(request["output_tokens"], TOKENS)
                        self.assertGreater(request["prompt_tokens"], 5)
                        self.assertGreater(request["time_to_first_token_ms"], 0)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
