// Prints each message of a JSON stream on a line, until it is closed: follow.mjs URL long-poll|sse
import { stream } from "@durable-streams/client"

const [url, live] = process.argv.slice(2)
const backoffOptions = { initialDelay: 50, maxDelay: 500, multiplier: 1.5 }
const found = await stream({ url, offset: "-1", live, json: true, backoffOptions })
for await (const message of found.jsonStream()) {
  process.stdout.write(JSON.stringify(message) + "\n")
}
