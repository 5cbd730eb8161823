// The guard's process: see hold.ts. It has nothing but the descriptors that it was started with.
import { Socket } from "node:net";
import { hold } from "./hold.js";
import { CONTROL } from "./guard-process.js";

// Whoever ends a session, a service or a terminal ends its processes; this one has to see the agent's end through.
for (const signal of ["SIGTERM", "SIGINT", "SIGHUP"] as const) process.on(signal, () => undefined);
await hold(new Socket({ fd: CONTROL, readable: true, writable: true }));
