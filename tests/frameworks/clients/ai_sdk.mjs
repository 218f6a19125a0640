// It shows of responses' reasoning the summary alone, which nobody makes here.
//
// Vercel's `ai` with its providers' defaults: text, stream, object, tools, over three APIs.
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { z } from "zod";
import { ANSWER, QUESTION, REAL, SCRIPTED, equal, run } from "./cases.mjs";

const real = createOpenAI({ baseURL: `${REAL}/v1`, apiKey: "none" });
const scripted = createOpenAI({ baseURL: `${SCRIPTED}/v1`, apiKey: "none" });
const compatible = createOpenAICompatible({ name: "bitwatt", baseURL: `${SCRIPTED}/v1` });
const anthropic = createAnthropic({ baseURL: `${SCRIPTED}/v1`, apiKey: "none" });
const weather = tool({
  description: "Tells the weather.",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => `sunny in ${city}`,
});

async function tools(model, thought) {
  const asked = { model, prompt: QUESTION, tools: { weather }, stopWhen: stepCountIs(3) };
  const { text, steps } = await generateText(asked);
  equal([text, steps.length, steps[0].reasoningText], [ANSWER, 2, thought]);
  const stream = streamText(asked);
  equal((await stream.text).trim(), ANSWER);
}

await run({
  async generate_text() {
    const { text } = await generateText({
      model: real("builtin"), prompt: QUESTION, maxOutputTokens: 9,
    });
    equal(text.length > 0, true);
  },
  async stream_text() {
    const { textStream } = streamText({
      model: real.chat("builtin"), prompt: QUESTION, maxOutputTokens: 9,
    });
    let text = "";
    for await (const piece of textStream) text += piece;
    equal(text.length > 0, true);
  },
  async generate_object() {
    for (const model of [real("builtin"), real.chat("builtin")]) {
      const { object } = await generateObject({
        model, schema: z.object({ city: z.enum(["Rome", "Oslo"]) }), prompt: QUESTION,
      });
      equal(["Rome", "Oslo"].includes(object.city), true);
    }
  },
  tools_over_responses: () => tools(scripted("tiny"), ""),
  tools_over_chat: () => tools(compatible("tiny"), "The tool knows."),
  tools_over_messages: () => tools(anthropic("tiny"), "The tool knows."),
});
