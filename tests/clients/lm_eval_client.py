"""lm-eval's `local-completions` against running rills: a task of its own, log-likelihoods beside an independent computation.

usage: lm_eval_client.py BASE_URL EXACT_BASE_URL EXACT.gguf      (URLs without /v1)

BASE_URL serves the default model, which must know its capitals. EXACT_BASE_URL serves EXACT.gguf, made by float_gguf.py.
"""
import json
import pathlib
import sys
import tempfile
import unittest

import lm_eval
import numpy
import requests
from lm_eval.tasks import TaskManager

import float_gguf

BASE, EXACT, GGUF = sys.argv[1:]
QUESTIONS = [
    {"question": f"The capital of {country} is", "choices": [" Paris", " Rome", " Tokyo", " Cairo"], "answer": answer}
    for answer, country in enumerate(["France", "Italy", "Japan", "Egypt"])
] + [
    {"question": "Ice is water that is", "choices": [" frozen solid", " boiling hot", " on fire"], "answer": 0},
    {"question": "Two plus two is", "choices": [" four", " seven – äöü 🏞️", " nine"], "answer": 0},
]


def evaluate(base, folder):
    """Results of the task, and each question's pairs of log-likelihood and whether greedy decoding says so."""
    data = pathlib.Path(folder, "questions.jsonl")
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    task = {
        "task": "questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "doc_to_choice": "{{choices}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    # Its tokenizer is the server's own, as `auto` finds out.
    model = {"model": "default", "base_url": f"{base}/v1/completions", "num_concurrent": 4, "max_retries": 1}
    # Its own tasks, thousands of files, are not looked at.
    manager = TaskManager(include_defaults=False)
    found = lm_eval.simple_evaluate("local-completions", model_args=model, tasks=[task], log_samples=True,
                                    bootstrap_iters=0, task_manager=manager)
    samples = sorted(found["samples"]["questions"], key=lambda sample: sample["doc_id"])
    pairs = [[tuple(response[0]) for response in sample["resps"]] for sample in samples]
    return found["results"]["questions"]["acc,none"], pairs


def tokens(text):
    answer = requests.post(f"{EXACT}/tokenize", json={"prompt": text, "add_special_tokens": False}, timeout=10)
    return answer.json()["tokens"]


class LmEval(unittest.TestCase):
    def test_accuracy(self):
        with tempfile.TemporaryDirectory() as folder:
            accuracy, pairs = evaluate(BASE, folder)
        print(">>>", accuracy, pairs, flush=True)
        self.assertEqual(accuracy, 1.0)
        # What is likeliest token by token is likeliest.
        self.assertTrue(any(greedy for question in pairs for _, greedy in question))

    def test_log_likelihoods(self):
        llama = float_gguf.FloatLlama(GGUF)
        with tempfile.TemporaryDirectory() as folder:
            _, cold = evaluate(EXACT, folder)
            # Everything is in the prefix cache now, which may change nothing.
            _, warm = evaluate(EXACT, folder)
        self.assertEqual(cold, warm)
        worst = 0
        for question, pairs in zip(QUESTIONS, cold, strict=True):
            start = len(tokens(question["question"]))
            for choice, (given, greedy) in zip(question["choices"], pairs, strict=True):
                ids = tokens(question["question"] + choice)
                rows = llama.logprobs(ids)[start - 1 : -1]
                expected = sum(rows[i, token] for i, token in enumerate(ids[start:]))
                worst = max(worst, abs(given - expected) / len(rows))
                self.assertEqual(greedy, bool((rows.argmax(1) == numpy.array(ids[start:])).all()))
        print(f">>> largest difference a token: {worst:.6f}", flush=True)
        self.assertLess(worst, 1e-3)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
