// Requests to the gateway, with the token that it wants, which is asked for once.

const KEPT = "runctl-token";

/** An error that the gateway names. `final`: asking again does not mend it. */
export class Problem extends Error {
  constructor(status, code, detail) {
    super(detail);
    this.status = status;
    this.code = code;
    this.final = status < 500 && status !== 429 && status !== 408;
  }
}

export class Api {
  #askToken;
  #asking = null;

  /** `askToken(problem)` resolves to what somebody typed. */
  constructor(askToken) {
    this.#askToken = askToken;
  }

  /** The response, if it is a good one. Throws Problem, and TypeError where nobody answers. */
  async request(path, { headers = {}, ...options } = {}) {
    for (;;) {
      const token = sessionStorage.getItem(KEPT);
      const shown = token === null ? headers : { ...headers, Authorization: `Bearer ${token}` };
      const response = await fetch(path, { ...options, headers: shown, cache: "no-store" });
      if (response.ok) return response;
      const problem = await readProblem(response);
      if (problem.status !== 401) throw problem;
      if (token === sessionStorage.getItem(KEPT)) await this.#renew(problem);
    }
  }

  async get(path, signal) {
    return (await this.request(path, { signal })).json();
  }

  async post(path, body = {}) {
    const options = { method: "POST", body: JSON.stringify(body) };
    const headers = { "Content-Type": "application/json" };
    return (await this.request(path, { ...options, headers })).json();
  }

  /** Many may find at once that it is wanted. */
  async #renew(problem) {
    this.#asking ??= this.#askToken(problem.message).then((token) => {
      sessionStorage.setItem(KEPT, token);
      this.#asking = null;
    });
    await this.#asking;
  }
}

async function readProblem(response) {
  try {
    const { code, detail } = await response.json();
    return new Problem(response.status, code, detail);
  } catch {
    return new Problem(response.status, "error", `the gateway answered ${response.status}`);
  }
}
