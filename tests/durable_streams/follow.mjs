// Prints each message of a run's stream on a line, until its end: follow.mjs URL long-poll|sse
// Where a connection breaks amid an answer the client may tell its user, who goes on behind the
// last batch. (That a session is `closed` it says too early.)
import { stream } from "@durable-streams/client"

const [url, live] = process.argv.slice(2)
const backoffOptions = { initialDelay: 50, maxDelay: 500, multiplier: 1.5 }
let offset = "-1"

async function follow() {
  const found = await stream({ url, offset, live, json: true, backoffOptions })
  await new Promise((_, broken) => {
    found.subscribeJson(async (batch) => {
      for (const message of batch.items) {
        process.stdout.write(JSON.stringify(message) + "\n")
        if (message.type === "end") process.stdout.write("", () => process.exit(0))
      }
      offset = batch.offset
    })
    found.closed.catch(broken)
  })
}

for (;;) {
  await follow().catch(() => new Promise((resolve) => setTimeout(resolve, 50)))
}
