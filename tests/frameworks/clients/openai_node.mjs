// The `openai` package of npm: both of its APIs.
import OpenAI from "openai";
import { ANSWER, QUESTION, REAL, SCRIPTED, equal, run } from "./cases.mjs";

const real = new OpenAI({ baseURL: `${REAL}/v1`, apiKey: "none" });
const scripted = new OpenAI({ baseURL: `${SCRIPTED}/v1`, apiKey: "none" });
const parameters = { type: "object", properties: { city: { type: "string" } } };
const asked = [{ role: "user", content: QUESTION }];

await run({
  async chat() {
    const answer = await real.chat.completions.create({
      model: "builtin", messages: asked, max_tokens: 9,
    });
    equal(answer.choices[0].message.content.length > 0, true);
  },
  async chat_stream() {
    let text = "";
    for await (const chunk of real.chat.completions.stream({
      model: "builtin", messages: asked, max_tokens: 9,
    })) text += chunk.choices[0]?.delta.content ?? "";
    equal(text.length > 0, true);
  },
  async chat_run_tools() {
    const runner = scripted.chat.completions.runTools({
      model: "tiny",
      messages: asked,
      tools: [{
        type: "function",
        function: {
          name: "weather", parameters, parse: JSON.parse, function: ({ city }) => `sunny in ${city}`,
        },
      }],
    });
    equal(await runner.finalContent(), ANSWER);
  },
  async responses_tools() {
    const tools = [{ type: "function", name: "weather", parameters, strict: false }];
    const stream = scripted.responses.stream({ model: "tiny", input: asked, tools });
    const { output } = await stream.finalResponse();
    equal(output.map((item) => item.type), ["reasoning", "function_call"]);
    const input = [
      ...asked, ...output,
      { type: "function_call_output", call_id: output[1].call_id, output: "sunny" },
    ];
    const answer = await scripted.responses.create({ model: "tiny", input, tools });
    equal(answer.output_text, ANSWER);
  },
});
