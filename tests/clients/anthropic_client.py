"""The real `anthropic` client, and `openai`'s for responses, against a running rill.

usage: anthropic_client.py BASE_URL      (BASE_URL without /v1; prints a transcript; exit 0 if everything held)
"""
import json
import sys
import typing
import unittest

import anthropic
import openai
import pydantic

BASE = sys.argv[1]
ASK = "Explain photosynthesis to a child in two sentences."
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def show(what, value):
    print(f">>> {what}\n{value!r}", flush=True)


class Anthropic(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.api = anthropic.Anthropic(base_url=BASE, api_key="unused", max_retries=0, timeout=120)

    def message(self, **kwargs):
        kwargs = {"model": "default", "max_tokens": 20, "messages": [{"role": "user", "content": ASK}], **kwargs}
        return self.api.messages.create(extra_body={"temperature": 0}, **kwargs)

    def test_message_and_stream(self):
        answer = self.message()
        show("messages.create", answer.content)
        self.assertEqual((answer.type, answer.role, answer.stop_reason), ("message", "assistant", "max_tokens"))
        self.assertEqual(answer.usage.output_tokens, 20)
        kwargs = {"model": "default", "max_tokens": 20, "messages": [{"role": "user", "content": ASK}], "extra_body": {"temperature": 0}}
        with self.api.messages.stream(**kwargs) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        self.assertEqual(text, answer.content[0].text)
        self.assertEqual((final.stop_reason, final.usage.output_tokens), ("max_tokens", 20))
        self.assertEqual(final.content[0].text, text)

    def test_count_tokens(self):
        messages = [{"role": "user", "content": ASK}]
        counted = self.api.messages.count_tokens(model="default", messages=messages).input_tokens
        usage = self.message(messages=messages).usage
        self.assertEqual(counted, usage.input_tokens + usage.cache_read_input_tokens)

    def test_tools(self):
        tools = [{"name": "weather", "description": "Weather forecast", "input_schema": SCHEMA}]
        answer = self.message(tools=tools, tool_choice={"type": "tool", "name": "weather"}, max_tokens=100)
        show("tool_choice={'type': 'tool'}", answer.content)
        block = answer.content[0]
        self.assertEqual((block.type, block.name, answer.stop_reason), ("tool_use", "weather", "tool_use"))
        self.assertIn(block.input["city"], ["Paris", "Rome"])
        self.assertIn(block.input["days"], range(1, 8))
        kwargs = {"model": "default", "max_tokens": 100, "messages": [{"role": "user", "content": ASK}], "extra_body": {"temperature": 0}}
        with self.api.messages.stream(tools=tools, tool_choice={"type": "tool", "name": "weather"}, **kwargs) as stream:
            self.assertEqual(stream.get_final_message().content[0].input, block.input)
        turns = [
            {"role": "user", "content": ASK},
            {"role": "assistant", "content": [{"type": "tool_use", "id": block.id, "name": block.name, "input": block.input}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block.id, "content": "sunny"}]},
        ]
        show("after the tool's result", self.message(messages=turns, tools=tools).content)

    def test_structured_output(self):
        config = {"format": {"type": "json_schema", "schema": SCHEMA}}
        answer = self.message(output_config=config, max_tokens=100)
        show("output_config={'format': …}", answer.content)
        self.assertIn(json.loads(answer.content[0].text)["city"], ["Paris", "Rome"])

    def test_errors(self):
        with self.assertRaises(anthropic.NotFoundError):
            self.message(model="no-such-model")
        with self.assertRaises(anthropic.BadRequestError) as caught:
            self.message(messages=[])
        self.assertEqual(caught.exception.body["error"]["type"], "invalid_request_error")


class Responses(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.api = openai.OpenAI(base_url=BASE + "/v1", api_key="unused", max_retries=0, timeout=120)

    def create(self, **kwargs):
        kwargs = {"model": "default", "input": ASK, "temperature": 0, "max_output_tokens": 20, **kwargs}
        return self.api.responses.create(**kwargs)

    def test_response_and_stream(self):
        answer = self.create()
        show("responses.create", answer.output_text)
        self.assertEqual((answer.status, answer.incomplete_details.reason), ("incomplete", "max_output_tokens"))
        text = ""
        for event in self.create(stream=True):
            if event.type == "response.output_text.delta":
                text += event.delta
        self.assertEqual(event.type, "response.incomplete")
        self.assertEqual((text, event.response.output_text), (answer.output_text, answer.output_text))
        again = self.create(input="And in one word?", previous_response_id=answer.id)
        self.assertGreater(again.usage.input_tokens, answer.usage.total_tokens)
        self.assertEqual(self.api.responses.retrieve(answer.id).output_text, answer.output_text)
        self.api.responses.delete(answer.id)
        with self.assertRaises(openai.NotFoundError):
            self.api.responses.retrieve(answer.id)

    def test_parse_and_tools(self):
        class Place(pydantic.BaseModel):
            model_config = pydantic.ConfigDict(extra="forbid")
            city: typing.Literal["Paris", "London", "Rome"]
            capital: bool

        parsed = self.api.responses.parse(model="default", input=ASK, text_format=Place, max_output_tokens=100)
        show("responses.parse(text_format=Place)", parsed.output_parsed)
        self.assertIsInstance(parsed.output_parsed, Place)
        tools = [{"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}]
        answer = self.create(tools=tools, tool_choice="required", parallel_tool_calls=False, max_output_tokens=100)
        call = answer.output[0]
        self.assertEqual((call.type, call.name), ("function_call", "weather"))
        self.assertIn(json.loads(call.arguments)["city"], ["Paris", "Rome"])
        with self.api.responses.stream(
            model="default", input=ASK, temperature=0, tools=tools, tool_choice="required", parallel_tool_calls=False,
            max_output_tokens=100,
        ) as stream:
            final = stream.get_final_response()
        self.assertEqual(final.output[0].arguments, call.arguments)


if __name__ == "__main__":
    print(f"anthropic {anthropic.__version__}, openai {openai.__version__}, {BASE}")
    unittest.main(argv=sys.argv[:1], verbosity=2)
