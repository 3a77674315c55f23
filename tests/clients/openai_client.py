"""The real `openai` client against a running rill: every call a user would make, and what is left after it.

usage: openai_client.py BASE_URL      (BASE_URL without /v1; prints a transcript; exit 0 if everything held)
"""
import asyncio
import json
import math
import re
import sys
import time
import typing
import unittest
import urllib.request

import openai
import pydantic

BASE = sys.argv[1]
CHAT = [{"role": "user", "content": "Explain photosynthesis to a child in two sentences."}]


def client(**kwargs):
    return openai.OpenAI(base_url=BASE + "/v1", api_key="unused", max_retries=0, timeout=120, **kwargs)


def metric(name):
    """The sum of a metric over its labels."""
    with urllib.request.urlopen(BASE + "/metrics", timeout=10) as page:
        values = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", page.read().decode(), re.M)
    assert values, f"/metrics has no {name}"
    return sum(map(float, values))


def wait_until_idle():
    """Nothing runs, nothing waits, no block is held: what a cancelled request must leave behind."""
    end = time.monotonic() + 20
    busy = ("vllm:num_requests_running", "vllm:num_requests_waiting", "rill_kv_blocks_held")
    while any(metric(name) for name in busy):
        if time.monotonic() > end:
            raise AssertionError({name: metric(name) for name in busy})
        time.sleep(0.02)
    free = metric("rill_kv_blocks_free") + metric("rill_kv_blocks_cached")
    assert free == metric("rill_kv_blocks"), "blocks that are neither held nor free"


def show(what, value):
    print(f">>> {what}\n{value!r}", flush=True)


class OpenAIClient(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.api = client()
        cls.model = cls.api.models.list().data[0].id

    def tearDown(self):
        wait_until_idle()

    def chat(self, **kwargs):
        kwargs = {"model": self.model, "messages": CHAT, "temperature": 0, "max_tokens": 48, **kwargs}
        return self.api.chat.completions.create(**kwargs)

    def complete(self, **kwargs):
        kwargs = {"model": self.model, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 16, **kwargs}
        return self.api.completions.create(**kwargs)

    def test_models(self):
        models = self.api.models.list()
        show("client.models.list()", [model.id for model in models.data])
        self.assertEqual(self.api.models.retrieve(self.model).id, self.model)

    def test_chat(self):
        answer = self.chat()
        choice = answer.choices[0]
        show("chat.completions.create(messages=[Explain photosynthesis…])", choice.message.content)
        self.assertEqual(answer.object, "chat.completion")
        self.assertEqual((choice.index, choice.message.role, choice.finish_reason), (0, "assistant", "stop"))
        self.assertIn("plants", choice.message.content)
        usage = answer.usage
        self.assertEqual(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens)
        # The model's own template: the system turn it puts first is part of the prompt.
        self.assertEqual(usage.prompt_tokens, 39)

    def test_chat_streamed_is_the_same(self):
        whole = self.chat(max_tokens=48)
        chunks = list(self.chat(max_tokens=48, stream=True, stream_options={"include_usage": True}))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        show("the same, stream=True", [c.choices[0].delta.content for c in chunks if c.choices])
        self.assertEqual(text, whole.choices[0].message.content)
        self.assertEqual(chunks[0].choices[0].delta.role, "assistant")
        self.assertTrue(all(c.choices[0].delta.role is None for c in chunks[1:] if c.choices), "role comes once")
        reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
        self.assertEqual([reason for reason in reasons if reason], [whole.choices[0].finish_reason])
        self.assertEqual(reasons[-1], whole.choices[0].finish_reason)
        self.assertEqual(chunks[-1].choices, [])
        self.assertEqual(chunks[-1].usage.completion_tokens, whole.usage.completion_tokens)
        self.assertTrue(all(chunk.usage is None for chunk in chunks[:-1]))
        self.assertEqual(len({chunk.id for chunk in chunks}), 1)

    def test_completion(self):
        answer = self.complete()
        show("completions.create(prompt='The capital of France is')", answer.choices[0].text)
        self.assertEqual((answer.object, answer.choices[0].finish_reason), ("text_completion", "length"))
        self.assertEqual((answer.usage.prompt_tokens, answer.usage.completion_tokens), (5, 16))
        streamed = list(self.complete(stream=True))
        self.assertEqual("".join(chunk.choices[0].text for chunk in streamed), answer.choices[0].text)
        self.assertTrue(all(chunk.object == "text_completion" for chunk in streamed))

    def test_many_prompts_and_choices(self):
        prompts = ["One, two, three,", "Red, green,"]
        answer = self.complete(prompt=prompts, n=2, temperature=0.9, seed=7)
        self.assertEqual([choice.index for choice in answer.choices], [0, 1, 2, 3])
        first = self.complete(prompt=prompts[0], temperature=0.9, seed=7)
        self.assertEqual(answer.choices[0].text, first.choices[0].text, "n changes nothing for the first choice")
        ids = self.complete(prompt=[504, 3575, 282, 4649, 314])
        self.assertEqual(ids.choices[0].text, self.complete().choices[0].text, "ids in place of text")

    def test_two_choices_streamed(self):
        texts, reasons = {}, {}
        for chunk in self.chat(n=2, temperature=1.0, seed=3, stream=True, max_tokens=32):
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
                reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
        show("n=2, temperature=1, seed=3, stream=True", texts)
        self.assertEqual(sorted(texts), [0, 1])
        whole = self.chat(n=2, temperature=1.0, seed=3, max_tokens=32)
        self.assertEqual([texts[0], texts[1]], [choice.message.content for choice in whole.choices])
        self.assertEqual([reasons[0], reasons[1]], [choice.finish_reason for choice in whole.choices])

    def test_seed(self):
        texts = [self.chat(temperature=1.2, seed=seed, max_tokens=40).choices[0].message.content for seed in (1, 1, 2)]
        self.assertEqual(texts[0], texts[1])
        self.assertNotEqual(texts[0], texts[2])

    def test_draws_follow_the_probabilities(self):
        prompt, draws = "My favourite colour is", 1280
        for temperature in (1.0, 0.7):
            counts = {}
            for seed in range(draws // 64):
                answer = self.complete(prompt=prompt, max_tokens=1, n=64, seed=seed, temperature=temperature)
                for choice in answer.choices:
                    counts[choice.text] = counts.get(choice.text, 0) + 1
            # Log-probabilities are those of temperature 1. At another, the odds of two tokens are theirs to the power
            # of 1 / temperature.
            logprobs = self.complete(prompt=prompt, max_tokens=1, logprobs=20).choices[0].logprobs.top_logprobs[0]
            if temperature == 1:
                expected = {token: math.exp(value) for token, value in logprobs.items()}
                for token, p in expected.items():
                    deviation = abs(counts.get(token, 0) - draws * p) / math.sqrt(draws * p * (1 - p))
                    self.assertLess(deviation, 4.5, (token, p, counts.get(token, 0)))
                show(f"{draws} draws at temperature 1: expected and drawn", {
                    token: (round(draws * p), counts.get(token, 0)) for token, p in expected.items()
                })
            else:
                first, second = sorted(logprobs, key=logprobs.get)[-1:-3:-1]
                odds = math.exp((logprobs[first] - logprobs[second]) / temperature)
                both = counts[first] + counts[second]
                share = odds / (1 + odds)
                deviation = abs(counts[first] - both * share) / math.sqrt(both * share * (1 - share))
                self.assertLess(deviation, 4.5, (first, second, odds, counts))

    def test_stop(self):
        plain = self.complete(prompt="1, 2, 3, 4,", max_tokens=24).choices[0].text
        cut = self.complete(prompt="1, 2, 3, 4,", max_tokens=24, stop=[" 7"]).choices[0]
        show("stop=[' 7']", (plain, cut.text, cut.finish_reason))
        self.assertEqual(cut.text, plain[: plain.index(" 7")])
        self.assertEqual(cut.finish_reason, "stop")
        streamed = self.complete(prompt="1, 2, 3, 4,", max_tokens=24, stop=[" 7"], stream=True)
        self.assertEqual("".join(chunk.choices[0].text for chunk in streamed), cut.text)

    def test_chat_logprobs(self):
        answer = self.chat(logprobs=True, top_logprobs=3)
        entries = answer.choices[0].logprobs.content
        show("logprobs=True, top_logprobs=3", entries[0])
        self.assertTrue(all(len(entry.top_logprobs) == 3 for entry in entries))
        for entry in entries:
            self.assertEqual(entry.top_logprobs[0].logprob, entry.logprob, "greedy takes the most likely")
            self.assertLessEqual(entry.logprob, 0)
        text = b"".join(bytes(entry.bytes or []) for entry in entries if entry.token != "<|im_end|>").decode()
        self.assertEqual(text, answer.choices[0].message.content)
        streamed = []
        for chunk in self.chat(logprobs=True, top_logprobs=3, stream=True):
            if chunk.choices and chunk.choices[0].logprobs:
                streamed += chunk.choices[0].logprobs.content
        self.assertEqual(streamed, entries)

    def test_completion_logprobs(self):
        logprobs = self.complete(logprobs=2, max_tokens=6).choices[0].logprobs
        show("completions, logprobs=2", logprobs)
        self.assertEqual(len(logprobs.tokens), 6)
        self.assertEqual(len(logprobs.token_logprobs), 6)
        self.assertEqual(len(logprobs.text_offset), 6)
        for token, value, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs):
            self.assertEqual(top[token], value)

    def test_echo_scores_a_prompt(self):
        answer = self.complete(prompt="The cat sat on the mat.", echo=True, logprobs=1, max_tokens=0).choices[0]
        show("echo=True, logprobs=1, max_tokens=0", answer)
        self.assertEqual(answer.text, "The cat sat on the mat.")
        self.assertIsNone(answer.logprobs.token_logprobs[0])
        self.assertTrue(all(value <= 0 for value in answer.logprobs.token_logprobs[1:]))
        self.assertEqual("".join(answer.logprobs.tokens), answer.text)
        again = self.complete(prompt="The cat sat on the mat.", echo=True, logprobs=1, max_tokens=0).choices[0]
        self.assertEqual(again.logprobs, answer.logprobs, "a prefix-cache hit changes nothing")

    def test_leaving_a_stream_cancels(self):
        before = metric("rill_request_success_total")
        stream = self.chat(stream=True, max_tokens=1500, extra_body={"ignore_eos": True})
        for number, _ in enumerate(stream):
            if number == 5:
                break
        self.assertEqual(metric("vllm:num_requests_running"), 1)
        generated = metric("vllm:generation_tokens_total")
        stream.close()
        wait_until_idle()
        show("left a stream of 1,500 tokens after 5 chunks; tokens generated since", metric("vllm:generation_tokens_total") - generated)
        self.assertLess(metric("vllm:generation_tokens_total") - generated, 400)
        self.assertEqual(metric("rill_request_success_total"), before + 1, "counted as ended, once")

    def test_async(self):
        async def run():
            async with openai.AsyncOpenAI(base_url=BASE + "/v1", api_key="unused", max_retries=0, timeout=120) as api:

                async def one(seed):
                    kwargs = {"model": self.model, "messages": CHAT, "max_tokens": 24, "seed": seed, "temperature": 0.8}
                    text = ""
                    async for chunk in await api.chat.completions.create(stream=True, **kwargs):
                        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
                    return text

                together = await asyncio.gather(*(one(seed) for seed in range(16)))
                apart = [await one(seed) for seed in range(0, 16, 5)]

                stream = await api.chat.completions.create(
                    model=self.model, messages=CHAT, max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
                )
                await anext(aiter(stream))
                await stream.close()
                return together, apart

        together, apart = asyncio.run(run())
        show("16 async streams at once, and every fifth again alone", apart)
        self.assertEqual(together[0:16:5], apart, "company changes no text")

    def test_errors_are_the_sdks_exceptions(self):
        def refused(kind, status, words, call):
            with self.assertRaises(kind) as caught:
                call()
            error = caught.exception
            show(f"{kind.__name__} {error.status_code}", error.body)
            self.assertEqual(error.status_code, status)
            self.assertEqual(set(error.body), {"message", "type", "param", "code"})
            for word in words:
                self.assertIn(word, error.body["message"])
            return error

        bad = openai.BadRequestError
        refused(openai.NotFoundError, 404, ["no-such-model"], lambda: self.chat(model="no-such-model"))
        refused(openai.NotFoundError, 404, ["nothing"], lambda: self.api.models.retrieve("nothing"))
        refused(bad, 400, ["temperature", "-1"], lambda: self.chat(temperature=-1))
        refused(bad, 400, ["top_p", "7"], lambda: self.chat(top_p=7))
        refused(bad, 400, ["n ", "0"], lambda: self.chat(n=0))
        refused(bad, 400, ["max_tokens"], lambda: self.chat(max_tokens=-5))
        refused(bad, 400, ["top_logprobs", "99"], lambda: self.chat(logprobs=True, top_logprobs=99))
        refused(bad, 400, ["messages"], lambda: self.chat(messages=[]))
        refused(bad, 400, ["prompt"], lambda: self.complete(prompt=""))
        refused(bad, 400, ["999999"], lambda: self.complete(prompt=[1, 999999]))
        refused(bad, 400, ["response_format"], lambda: self.chat(response_format={"type": "json_schema"}))
        refused(bad, 400, ["tool_choice"], lambda: self.chat(tool_choice="required"))
        refused(bad, 400, ["8192"], lambda: self.complete(prompt="word " * 9000))
        error = refused(bad, 400, ["8192"], lambda: self.complete(max_tokens=100_000))
        self.assertEqual(error.code, "context_length_exceeded")
        with self.assertRaises(bad):
            self.chat(logit_bias={"not a token": 1})

    def test_penalties_and_bias_change_the_text(self):
        plain = self.complete(max_tokens=32).choices[0].text
        for name, value in [("presence_penalty", 2), ("frequency_penalty", 2)]:
            self.assertNotEqual(self.complete(max_tokens=32, **{name: value}).choices[0].text, plain, name)
        penalised = self.complete(max_tokens=32, extra_body={"repetition_penalty": 1.5}).choices[0].text
        self.assertNotEqual(penalised, plain)
        biased = self.complete(max_tokens=4, logit_bias={"28": 100}).choices[0].text
        self.assertEqual(biased, ",,,,")

    def test_structured_output_parses(self):
        class Place(pydantic.BaseModel):
            model_config = pydantic.ConfigDict(extra="forbid")
            city: typing.Literal["Paris", "London", "Rome"]
            population: typing.Annotated[int, pydantic.Field(ge=0, le=100_000_000)]
            capital: bool

        answer = self.api.chat.completions.parse(
            model=self.model, messages=CHAT, temperature=1, seed=1, max_tokens=100, response_format=Place
        )
        show("chat.completions.parse(response_format=Place)", answer.choices[0].message.parsed)
        self.assertIsInstance(answer.choices[0].message.parsed, Place)
        choice = self.chat(extra_body={"guided_choice": ["yes", "no"]}).choices[0]
        self.assertIn(choice.message.content, ["yes", "no"])
        self.assertEqual(choice.finish_reason, "stop")

    def test_tools(self):
        parameters = {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
            "required": ["city", "days"],
            "additionalProperties": False,
        }
        tools = [{"type": "function", "function": {"name": "weather", "description": "Weather forecast", "parameters": parameters}}]
        asked = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 100}
        answer = self.chat(**asked)
        message = answer.choices[0].message
        show("tools=[weather], tool_choice='required'", message.tool_calls)
        self.assertEqual(answer.choices[0].finish_reason, "tool_calls")
        call = message.tool_calls[0]
        self.assertEqual((call.type, call.function.name), ("function", "weather"))
        arguments = json.loads(call.function.arguments)
        self.assertIn(arguments["city"], ["Paris", "Rome"])
        self.assertIn(arguments["days"], range(1, 8))
        with self.api.chat.completions.stream(
            model=self.model, messages=CHAT, temperature=0, **asked
        ) as stream:
            streamed = stream.get_final_completion().choices[0]
        self.assertEqual(streamed.finish_reason, "tool_calls")
        self.assertEqual(streamed.message.tool_calls[0].function.arguments, call.function.arguments)
        # The result goes back, and an answer in words comes.
        turn = [*CHAT, message, {"role": "tool", "tool_call_id": call.id, "content": "sunny, 24 degrees"}]
        final = self.chat(messages=turn, tools=tools).choices[0]
        show("after the tool's result", final.message.content)
        self.assertIn(final.finish_reason, ["stop", "length", "tool_calls"])

    def test_max_completion_tokens_wins(self):
        answer = self.chat(max_tokens=24, max_completion_tokens=3)
        self.assertEqual((answer.usage.completion_tokens, answer.choices[0].finish_reason), (3, "length"))


if __name__ == "__main__":
    print(f"openai {openai.__version__}, {BASE}")
    unittest.main(argv=sys.argv[:1], verbosity=2)
