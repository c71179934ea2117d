// JavaScript: OpenAI's and Anthropic's clients, and the AI SDK.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const { STAR_URL, STAR_KEY, STAR_MODEL, STAR_DOCUMENT, STAR_NODE } = process.env;
const require = createRequire(`${STAR_NODE}/`);
const { OpenAI } = require("openai");
const { Anthropic } = require("@anthropic-ai/sdk");
const { createOpenAICompatible } = require("@ai-sdk/openai-compatible");
const { generateText, streamText } = require("ai");

const DOCUMENT = readFileSync(STAR_DOCUMENT, "utf8");
const QUESTION = "What is the secret number for torpidity-kill?";
const SECOND = "What is the secret number for lyric-known?";
const TOO_MANY = 70000;
const MARK = { prompt_cache_breakpoint: { mode: "explicit" } };

const baseURL = `${STAR_URL}/v1`;
const openai = new OpenAI({ baseURL, apiKey: STAR_KEY, maxRetries: 0 });
const anthropic = new Anthropic({ baseURL: STAR_URL, apiKey: STAR_KEY, maxRetries: 0 });
const model = createOpenAICompatible({
  name: "star", baseURL, apiKey: STAR_KEY, includeUsage: true,
})(STAR_MODEL);

const parts = (question, type = "text", mark = MARK) => [
  { type, text: DOCUMENT, ...mark },
  { type, text: question },
];
const user = (content) => [{ role: "user", content }];
const chat = (content, options = {}, client = openai) =>
  client.chat.completions.create({
    model: STAR_MODEL, messages: user(content), max_tokens: 24, ...options,
  });

async function asked(content) {
  const { choices, usage } = await chat(content);
  return { text: choices[0].message.content, cached: usage.prompt_tokens_details.cached_tokens };
}

async function stream() {
  const options = { stream: true, stream_options: { include_usage: true } };
  let text = "", cached;
  for await (const chunk of await chat(parts(SECOND), options)) {
    text += chunk.choices[0]?.delta.content ?? "";
    cached = chunk.usage?.prompt_tokens_details.cached_tokens;
  }
  return { text, cached };
}

async function left() {
  const chunks = await chat("Count.", { stream: true, max_tokens: 60000, ignore_eos: true });
  for await (const _ of chunks) break;
  return true;
}

async function responseStream() {
  const events = openai.responses.stream({
    model: STAR_MODEL, input: user(parts(QUESTION, "input_text")), max_output_tokens: 24,
  });
  const { output_text, usage } = await events.finalResponse();
  return { text: output_text, cached: usage.input_tokens_details.cached_tokens };
}

async function messageStream() {
  const content = parts(SECOND, "text", { cache_control: { type: "ephemeral" } });
  const events = anthropic.messages.stream({
    model: STAR_MODEL, max_tokens: 24, messages: user(content),
  });
  const message = await events.finalMessage();
  return { text: message.content[0].text, cached: message.usage.cache_read_input_tokens };
}

const prompt = (question) => ({
  model, maxOutputTokens: 24, maxRetries: 0, messages: user(parts(question, "text", {})),
});

async function sdk() {
  const { text, usage } = await generateText(prompt(QUESTION));
  return { text, cached: usage.cachedInputTokens };
}

async function sdkStream() {
  const { textStream, usage } = streamText(prompt(SECOND));
  let text = "";
  for await (const piece of textStream) text += piece;
  return { text, cached: (await usage).cachedInputTokens };
}

function version(name) {
  const file = `${STAR_NODE}/node_modules/${name}/package.json`;
  return JSON.parse(readFileSync(file, "utf8")).version;
}

const steps = {
  version: () => ["openai", "@anthropic-ai/sdk", "ai"].map(version),
  models: async () => (await openai.models.list()).data.map((each) => each.id),
  chat: async () => (await asked(QUESTION)).text,
  document: () => asked(parts(QUESTION)),
  second: () => asked(parts(SECOND)),
  stream,
  left,
  response_stream: responseStream,
  message_stream: messageStream,
  sdk,
  sdk_stream: sdkStream,
  too_long: () => chat(QUESTION, { max_tokens: TOO_MANY }),
  wrong_key: () => chat(QUESTION, {}, openai.withOptions({ apiKey: "wrong" })),
};

const results = {};
for (const [name, step] of Object.entries(steps)) {
  try {
    results[name] = await step();
  } catch (error) {
    results[name] = { error: [error.constructor.name], message: String(error).slice(0, 500) };
  }
}
console.log(JSON.stringify(results));
