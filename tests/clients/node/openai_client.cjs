// The real `openai` client for Node against a running rill whose keys are "sesame" and "scarce" (one request a minute).
//
// usage: node openai_client.cjs BASE_URL      (BASE_URL without /v1; exit 0 if everything held)
"use strict";

const assert = require("node:assert/strict");
const { test } = require("node:test");
const OpenAI = require("openai");

const baseURL = `${process.argv[2]}/v1`;
const client = (apiKey = "sesame") => new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: 120_000 });
const api = client();
const model = "default";
const messages = [{ role: "user", content: "Explain photosynthesis to a child in two sentences." }];
const weather = {
  type: "function",
  function: {
    name: "weather",
    description: "Weather forecast for a city.",
    parameters: {
      type: "object",
      properties: { city: { type: "string", enum: ["Paris", "Rome"] } },
      required: ["city"],
      additionalProperties: false,
    },
  },
};

const collect = async (items) => {
  const all = [];
  for await (const item of items) all.push(item);
  return all;
};

test("models", async () => {
  const models = await collect(api.models.list());
  assert.equal(models[0].object, "model");
  assert.deepEqual(await api.models.retrieve(models[0].id), models[0]);
});

test("chat, streamed and not", async () => {
  const body = { model, messages, temperature: 0, max_tokens: 24 };
  const whole = await api.chat.completions.create(body);
  assert.equal(whole.object, "chat.completion");
  assert.equal(whole.choices[0].message.role, "assistant");
  assert.equal(whole.usage.total_tokens, whole.usage.prompt_tokens + whole.usage.completion_tokens);
  const options = { include_usage: true };
  const chunks = await collect(await api.chat.completions.create({ ...body, stream: true, stream_options: options }));
  const text = chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");
  assert.equal(text, whole.choices[0].message.content);
  assert.equal(chunks.at(-1).choices.length, 0);
  assert.equal(chunks.at(-1).usage.completion_tokens, whole.usage.completion_tokens);
  // The SDK's own accumulator, which throws on what it does not expect.
  const final = await api.chat.completions.stream(body).finalChatCompletion();
  assert.equal(final.choices[0].message.content, whole.choices[0].message.content);
  assert.equal(final.choices[0].finish_reason, whole.choices[0].finish_reason);
});

test("several choices and log-probabilities, as streamed", async () => {
  const body = { model, messages, seed: 7, max_tokens: 8, n: 2, logprobs: true, top_logprobs: 2 };
  const whole = await api.chat.completions.create(body);
  const final = await api.chat.completions.stream(body).finalChatCompletion();
  for (const index of [0, 1]) {
    assert.equal(final.choices[index].message.content, whole.choices[index].message.content);
    assert.deepEqual(final.choices[index].logprobs.content, whole.choices[index].logprobs.content);
    assert.equal(whole.choices[index].logprobs.content[0].top_logprobs.length, 2);
  }
});

test("completions", async () => {
  const body = { model, prompt: ["The capital of France is", "Once"], temperature: 0, max_tokens: 6, logprobs: 1 };
  const whole = await api.completions.create({ ...body, echo: true });
  assert.match(whole.choices[0].text, /^The capital of France is Paris/);
  assert.equal(whole.choices[0].logprobs.token_logprobs[0], null);
  const chunks = await collect(await api.completions.create({ ...body, stream: true }));
  const second = chunks.filter((chunk) => chunk.choices[0].index === 1).map((chunk) => chunk.choices[0].text);
  assert.equal(`Once${second.join("")}`, whole.choices[1].text);
});

test("tools", async () => {
  const body = { model, messages: [{ role: "user", content: "How is the weather in Rome?" }], temperature: 0,
    tools: [weather], tool_choice: "required", max_tokens: 60 };
  const answer = await api.chat.completions.create(body);
  assert.equal(answer.choices[0].finish_reason, "tool_calls");
  const [call] = answer.choices[0].message.tool_calls;
  assert.equal(call.type, "function");
  assert.ok(["Paris", "Rome"].includes(JSON.parse(call.function.arguments).city));
  const final = await api.chat.completions.stream(body).finalChatCompletion();
  assert.equal(final.choices[0].message.tool_calls[0].function.arguments, call.function.arguments);
  const result = { role: "tool", tool_call_id: call.id, content: "sunny" };
  const next = await api.chat.completions.create({ model, max_tokens: 8, temperature: 0, tools: [weather],
    messages: [...body.messages, answer.choices[0].message, result] });
  assert.ok(["stop", "length", "tool_calls"].includes(next.choices[0].finish_reason));
  // The SDK runs the function itself and asks again.
  const seen = [];
  const runnable = { type: "function", function: { ...weather.function, parse: JSON.parse,
    function: (input) => (seen.push(input.city), "sunny") } };
  const tool_choice = { type: "function", function: { name: "weather" } };
  await api.chat.completions.runTools({ ...body, tools: [runnable], tool_choice }).done();
  assert.equal(seen.length, 1);
});

test("structured output", async () => {
  const schema = { type: "object", properties: { city: { enum: ["Paris", "Rome"] } }, required: ["city"],
    additionalProperties: false };
  const response_format = { type: "json_schema", json_schema: { name: "place", strict: true, schema } };
  const answer = await api.chat.completions.create({ model, messages, response_format, max_tokens: 40 });
  assert.ok(["Paris", "Rome"].includes(JSON.parse(answer.choices[0].message.content).city));
});

test("responses", async () => {
  const body = { model, input: "Name a colour.", temperature: 0, max_output_tokens: 12 };
  const whole = await api.responses.create(body);
  assert.equal(whole.object, "response");
  assert.ok(whole.output_text.length > 0);
  const types = new Set();
  const stream = api.responses.stream(body).on("event", (event) => types.add(event.type));
  const final = await stream.finalResponse();
  assert.equal(final.output_text, whole.output_text);
  for (const type of ["response.created", "response.output_text.delta", "response.output_text.done"]) {
    assert.ok(types.has(type), `${type} of ${[...types]}`);
  }
  const next = await api.responses.create({ ...body, input: "Another?", previous_response_id: whole.id });
  assert.equal(next.previous_response_id, whole.id);
  assert.equal((await api.responses.retrieve(next.id)).output_text, next.output_text);
  await api.responses.delete(next.id);
  await assert.rejects(api.responses.retrieve(next.id), OpenAI.NotFoundError);
});

test("embeddings", async () => {
  // Without encoding_format the SDK asks for base64 and decodes it.
  const input = ["a cat", "a dog"];
  const { data, usage } = await api.embeddings.create({ model, input });
  const floats = await api.embeddings.create({ model, input, encoding_format: "float" });
  assert.equal(usage.prompt_tokens, usage.total_tokens);
  for (const index of [0, 1]) {
    assert.equal(data[index].index, index);
    assert.deepEqual(Array.from(data[index].embedding), floats.data[index].embedding.map(Math.fround));
    const length = Math.hypot(...data[index].embedding);
    assert.ok(Math.abs(length - 1) < 1e-4, `${length}`);
  }
});

test("a stream that is left early", async () => {
  const stream = await api.chat.completions.create({ model, messages, max_tokens: 4000, stream: true });
  let seen = 0;
  for await (const _ of stream) if (++seen === 3) break;
  assert.equal(stream.controller.signal.aborted, true);
});

test("errors have the SDK's types", async () => {
  const refused = async (promise, type, status, details) => {
    const error = await promise.then(() => assert.fail("accepted"), (error) => error);
    assert.ok(error instanceof type, `${error}`);
    assert.equal(error.status, status);
    for (const [name, value] of Object.entries(details)) assert.equal(error[name], value, name);
    return error;
  };
  const chat = (api, extra = {}) => api.chat.completions.create({ model, messages, max_tokens: 1, ...extra });
  const invalid = { type: "invalid_request_error" };
  await refused(chat(api, { temperature: 9 }), OpenAI.BadRequestError, 400, { ...invalid, param: "temperature" });
  await refused(chat(api, { model: "none" }), OpenAI.NotFoundError, 404, { code: "model_not_found" });
  await refused(chat(client("wrong")), OpenAI.AuthenticationError, 401, { code: "invalid_api_key" });
  const scarce = client("scarce");
  const { response } = await chat(scarce).withResponse();
  assert.equal(response.headers.get("x-ratelimit-limit-requests"), "1");
  assert.equal(response.headers.get("x-ratelimit-remaining-requests"), "0");
  const limited = { code: "rate_limit_exceeded", type: "requests" };
  const error = await refused(chat(scarce), OpenAI.RateLimitError, 429, limited);
  assert.ok(Number(error.headers.get("retry-after")) > 50);
  // In the middle of a stream, too, an error has its type: this one comes before it begins.
  await refused(chat(api, { stream: true, n: 0 }), OpenAI.BadRequestError, 400, { param: "n" });
});
