// Chat through OpenAI's own client: npm install, then node chat.js
import OpenAI from "openai";

const client = new OpenAI({
  baseURL: `${process.env.BITWATT_URL ?? "http://127.0.0.1:8000"}/v1`,
  apiKey: process.env.BITWATT_KEY ?? "none",
});
const stream = await client.chat.completions.create({
  model: process.env.BITWATT_MODEL ?? "builtin",
  messages: [{ role: "user", content: "What does os.path.join do?" }],
  max_tokens: 64,
  seed: 1,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  process.stdout.write(chunk.choices[0]?.delta?.content ?? "");
  if (chunk.usage) {
    console.log(`\n[${chunk.usage.prompt_tokens} + ${chunk.usage.completion_tokens} tokens]`);
  }
}
