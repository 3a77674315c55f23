"""langchain's chat models over rill: text, streams, structured output and tools, through each of the APIs they speak.

usage: langchain_client.py BASE_URL      (BASE_URL without /v1; prints a transcript; exit 0 if everything held)
"""
import sys
import typing
import unittest

import pydantic
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

BASE = sys.argv[1]


class Place(pydantic.BaseModel):
    """A place."""

    city: typing.Literal["Paris", "Rome"]
    capital: bool


@tool
def weather(city: typing.Literal["Paris", "Rome"]) -> str:
    """Weather forecast."""
    return f"sunny in {city}"


def models():
    common = {"api_key": "unused", "model": "default", "max_tokens": 80, "max_retries": 0}
    yield "chat", ChatOpenAI(base_url=BASE + "/v1", temperature=0, **common)
    yield "responses", ChatOpenAI(base_url=BASE + "/v1", temperature=0, use_responses_api=True, **common)
    yield "messages", ChatAnthropic(base_url=BASE, **common)


class Langchain(unittest.TestCase):
    def each(self, check):
        for name, model in models():
            with self.subTest(name):
                print(">>>", name, check(model), flush=True)

    def test_text(self):
        def check(model):
            self.assertTrue(model.invoke("Hi").text)
            return "".join(chunk.text for chunk in model.stream("Hi"))

        self.each(check)

    def test_structured_output(self):
        def check(model):
            place = model.with_structured_output(Place).invoke("Name a city.")
            self.assertIsInstance(place, Place)
            return place

        self.each(check)

    def test_tools(self):
        def check(model):
            answer = model.bind_tools([weather], tool_choice="any").invoke("How is the weather?")
            call = answer.tool_calls[0]
            self.assertEqual(call["name"], "weather")
            result = weather.invoke(call["args"])
            turns = [HumanMessage("How is the weather?"), answer]
            turns += [ToolMessage(result, tool_call_id=call["id"]) for call in answer.tool_calls]
            model.bind_tools([weather]).invoke(turns)
            whole = None
            for chunk in model.bind_tools([weather], tool_choice="any").stream("How is the weather?"):
                whole = chunk if whole is None else whole + chunk
            self.assertEqual(whole.tool_calls[0]["name"], "weather")
            return result

        self.each(check)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
