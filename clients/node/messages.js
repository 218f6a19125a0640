// The same through Anthropic's own client: npm install, then node messages.js
import Anthropic from "@anthropic-ai/sdk";

const client = new Anthropic({
  baseURL: process.env.BITWATT_URL ?? "http://127.0.0.1:8000",
  apiKey: process.env.BITWATT_KEY ?? "none",
});
const stream = client.messages.stream({
  model: process.env.BITWATT_MODEL ?? "builtin",
  messages: [{ role: "user", content: "What does os.path.join do?" }],
  max_tokens: 64,
});
stream.on("text", (text) => process.stdout.write(text));
const { usage } = await stream.finalMessage();
console.log(`\n[${usage.input_tokens} + ${usage.output_tokens} tokens]`);
