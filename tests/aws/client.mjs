// A Node client of the WebSocket gateway: node client.mjs FOLDER_WITH_ws URL -> one JSON line of what it saw.
import { createRequire } from "node:module";

const [folder, url] = process.argv.slice(2);
const WebSocket = createRequire(folder + "/")("ws");

function generate(socket, request, onToken = () => {}) {
  return new Promise((resolve, reject) => {
    const heard = [];
    const listen = (data) => {
      const message = JSON.parse(data);
      if (message.request_id !== request.request_id) return;
      heard.push(message);
      if (message.type === "token") onToken(message);
      if (message.type === "complete" || message.type === "error") {
        socket.off("message", listen);
        resolve(heard);
      }
    };
    socket.on("message", listen);
    socket.on("error", reject);
    socket.send(JSON.stringify({ action: "generate", ...request }));
  });
}

function open(address) {
  return new Promise((resolve, reject) => {
    const socket = new WebSocket(address);
    socket.on("open", () => resolve(socket));
    socket.on("unexpected-response", (_, response) => resolve(response.statusCode));
    socket.on("error", reject);
  });
}

const refused = await open(url.split("?")[0] + "?token=wrong");
const socket = await open(url);
const whole = await generate(socket, { request_id: "node", prompt: "It was", max_tokens: 12, seed: 5, n: 1 });
const stopped = await generate(
  socket,
  { request_id: "stopped", prompt: "It was", max_tokens: 2000, seed: 5 },
  (message) => message.seq === 2 && socket.send(JSON.stringify({ action: "stop", request_id: "stopped" })),
);
const wrong = await generate(socket, { request_id: "wrong", prompt: "It was", temperature: 9 });
socket.close();
console.log(JSON.stringify({ refused, whole, stopped, wrong }));
