// What every client's script has, as cases.py: where the servers are, and how its cases run.
import process from "node:process";

export const REAL = process.env.REAL_URL;
export const SCRIPTED = process.env.SCRIPTED_URL;
export const QUESTION = "How is the weather in Rome?";
export const ANSWER = "It is sunny in Rome.";

export function equal(one, other) {
  const [a, b] = [JSON.stringify(one), JSON.stringify(other)];
  if (a !== b) throw new Error(`${a} is not ${b}`);
}

export async function run(cases) {
  for (const [name, work] of Object.entries(cases)) {
    let fault = null;
    try {
      await work();
    } catch (error) {
      if (process.env.VERBOSE) console.error(error);
      fault = `${error.name}: ${error.message}`.replace(/\s+/g, " ").slice(0, 300);
    }
    console.log(JSON.stringify({ case: name, fault }));
  }
}
