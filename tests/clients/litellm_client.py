"""litellm's `openai/` provider against a running rill: chats, completions, streams, tools, responses, embeddings and errors.

usage: litellm_client.py BASE_URL      (BASE_URL without /v1; prints a transcript; exit 0 if everything held)
"""
import asyncio
import json
import sys
import unittest

import litellm

BASE = sys.argv[1]
COMMON = {"api_base": BASE + "/v1", "api_key": "unused", "num_retries": 0, "timeout": 120}
CHAT = [{"role": "user", "content": "Explain photosynthesis to a child in two sentences."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather forecast for a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
        },
    },
}


def chat(**kwargs):
    kwargs = {"messages": CHAT, "temperature": 0, "max_tokens": 24, **kwargs}
    return litellm.completion(model="openai/default", **COMMON, **kwargs)


class LiteLLM(unittest.TestCase):
    def test_chat(self):
        answer = chat()
        self.assertTrue(answer.choices[0].message.content)
        self.assertEqual(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens)
        chunks = list(chat(stream=True, stream_options={"include_usage": True}))
        whole = litellm.stream_chunk_builder(chunks, messages=CHAT)
        print(">>>", whole.choices[0].message.content, flush=True)
        self.assertEqual(whole.choices[0].message.content, answer.choices[0].message.content)
        self.assertEqual(whole.choices[0].finish_reason, answer.choices[0].finish_reason)
        self.assertEqual(whole.usage.completion_tokens, answer.usage.completion_tokens)

    def test_several_at_once(self):
        async def ask():
            calls = [
                litellm.acompletion(model="openai/default", messages=CHAT, max_tokens=8, seed=seed, **COMMON)
                for seed in (1, 2, 1, 2)
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*calls)]

        one, two, one_again, two_again = asyncio.run(ask())
        self.assertEqual((one, two), (one_again, two_again))

    def test_text_completion(self):
        answer = litellm.text_completion(
            model="text-completion-openai/default", prompt="The capital of France is", max_tokens=4, temperature=0,
            **COMMON,
        )
        self.assertIn("Paris", answer.choices[0].text)

    def test_tools(self):
        messages = [{"role": "user", "content": "How is the weather in Rome?"}]
        asked = {"messages": messages, "tools": [WEATHER], "tool_choice": "required", "max_tokens": 60}
        message = chat(**asked).choices[0].message
        call = message.tool_calls[0]
        self.assertEqual(call.function.name, "weather")
        self.assertIn(json.loads(call.function.arguments)["city"], ["Paris", "Rome"])
        whole = litellm.stream_chunk_builder(list(chat(**asked, stream=True)), messages=messages)
        self.assertEqual(whole.choices[0].message.tool_calls[0].function, call.function)
        self.assertEqual(whole.choices[0].finish_reason, "tool_calls")
        messages += [message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
        self.assertTrue(chat(messages=messages, tools=[WEATHER]).choices)

    def test_structured_output(self):
        schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"],
                  "additionalProperties": False}
        wanted = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema, "strict": True}}
        answer = chat(response_format=wanted, max_tokens=40)
        self.assertIn(json.loads(answer.choices[0].message.content)["city"], ["Paris", "Rome"])

    def test_responses(self):
        asked = {"model": "openai/default", "input": "Name a colour.", "max_output_tokens": 8, "temperature": 0, **COMMON}
        answer = litellm.responses(**asked)
        self.assertEqual(answer.object, "response")
        last = list(litellm.responses(**asked, stream=True))[-1]
        self.assertEqual((last.type, last.response.status), ("response.completed", answer.status))
        self.assertEqual(last.response.output[0].content[0].text, answer.output[0].content[0].text)

    def test_embeddings(self):
        answer = litellm.embedding(model="openai/default", input=["a cat", "a dog"], **COMMON)
        self.assertEqual([item["index"] for item in answer.data], [0, 1])
        self.assertAlmostEqual(sum(value**2 for value in answer.data[0]["embedding"]), 1, places=4)

    def test_errors(self):
        with self.assertRaises(litellm.BadRequestError):
            chat(temperature=9)
        with self.assertRaises(litellm.NotFoundError):
            litellm.completion(model="openai/none", messages=CHAT, **COMMON)
        with self.assertRaises(litellm.ContextWindowExceededError):
            chat(messages=[{"role": "user", "content": "word " * 20000}])


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
