"""llama.cpp's server API, as mikupad and SillyTavern use it, and the tokenizer routes that it shares with vLLM.

POST /completion {"prompt": "The fog", "n_predict": 40, "n_probs": 5} -> {"content": ..., "completion_probabilities": [...]}
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, Iterator
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from config import GenerationParams
from server import schemas
from server.client_bodies import DetokenizeBody, LlamaBody, TokenizeBody, llama_settings
from server.generation import Generation
from server.logprobs import token_entries, token_entry
from server.openapi import GENERATION_ERRORS, TEXT_EVENT, errors, streaming
from server.service import Service, reserved_text
from server.streaming import SSE_TYPE, StreamResponse, event_frames, sse, whole_answer

if TYPE_CHECKING:
    from inference.engine import Event


def add_routes(app: FastAPI, service: Service) -> None:
    @app.post("/completions", include_in_schema=False)
    @app.post(
        "/completion", response_model=schemas.LlamaReply, responses=streaming(SSE_TYPE, TEXT_EVENT), tags=["llama.cpp"]
    )
    async def completion(request: Request, body: LlamaBody) -> Response:
        """Continue a prompt. With `n` above 1 the whole answer is a list; a stream's parts have an `index`."""
        params = body.without_end(body.params(service.settings, service.defaults), service.ready().tokenizer.eot)
        generation = await service.start(
            body.single_prompt(),
            params,
            request_id=request.state.request_id,
            logprobs=body.n_probs or None,
            post_sampling=bool(body.post_sampling_probs),
        )
        answer = LlamaAnswer(service, generation, body)
        if body.stream:
            return StreamResponse(answer.events(), [generation], SSE_TYPE, service.settings.stall_s)
        return await whole_answer(request, [generation], answer.reply)

    @app.get("/props", responses=errors(401, 503), tags=["llama.cpp"])
    async def props() -> Response:
        """The model, its context, and the settings of a request that leaves them open."""
        engine = service.ready()
        defaults = llama_settings(GenerationParams(**LlamaBody().given_with(service.settings, service.defaults)))
        return JSONResponse(
            {
                "default_generation_settings": {"n_ctx": engine.context, "params": defaults},
                "total_slots": service.settings.slots,
                "model_path": service.name,
                "model_alias": service.name,
                "chat_template": "",
                "modalities": {"vision": False, "audio": False},
                "build_info": f"victorian-literature-generator {app.version}",
            }
        )

    add_tokenizer_routes(app, service)


def add_tokenizer_routes(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", response_model=schemas.TokenizeReply, responses=GENERATION_ERRORS, tags=["llama.cpp"])
    async def tokenize(body: TokenizeBody) -> Response:
        """The token ids of a text."""
        engine = service.ready()
        ids = await service.encode(body.content, "content", controls=body.parse_special is not False)
        tokens: list[Any] = ids
        if body.with_pieces:
            tokens = [{"id": id, "piece": piece(engine.tokenizer.piece(id))} for id in ids]
        return JSONResponse({"tokens": tokens, "count": len(ids), "max_model_len": engine.context})

    @app.post("/detokenize", response_model=schemas.DetokenizeReply, responses=GENERATION_ERRORS, tags=["llama.cpp"])
    async def detokenize(body: DetokenizeBody) -> Response:
        """The text of token ids; reserved tokens by name."""
        service.check_prompt(body.tokens, "tokens")
        text = reserved_text(service.ready().tokenizer, body.tokens)
        return JSONResponse({"content": text, "prompt": text})

    @app.get("/tokenizer_info", response_model=schemas.TokenizerReply, responses=errors(401, 503), tags=["llama.cpp"])
    async def tokenizer_info() -> Response:
        """The tokenizer as vLLM describes it: lm-eval then needs no folder."""
        from tokenizer import END_OF_TEXT

        engine = service.ready()
        eos = None if engine.tokenizer.eot is None else END_OF_TEXT
        names = dict.fromkeys(("eos_token", "bos_token", "unk_token"), eos)
        return JSONResponse(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                **names,
                "pad_token": None,
                "chat_template": None,
                "vocab_size": engine.tokenizer.vocab_size,
                "model_max_length": engine.context,
            }
        )


def piece(value: bytes) -> str | list[int]:
    """A token's text, or its bytes where they are no whole characters."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return list(value)


class LlamaAnswer:
    """One `/completion` request: its generation and the form of its answer."""

    def __init__(self, service: Service, generation: Generation, body: LlamaBody):
        self.service, self.generation, self.body = service, generation, body
        self.tokenizer = service.ready().tokenizer
        self.begun = time.monotonic()

    def reply(self) -> Any:
        """The whole answer, once the generation is complete."""
        whole = [self.final(sample, stream=False) for sample in range(self.generation.params.n)]
        return whole[0] if len(whole) == 1 else whole

    def final(self, sample: int, stream: bool) -> dict[str, Any]:
        """A complete sample; of a stream without what was sent before."""
        generation = self.generation
        job, stop = generation.job, generation.stop_string(sample, self.tokenizer)
        text, written = generation.text(sample), generation.counts[sample]
        seconds = max(1e-6, time.monotonic() - self.begun - (generation.first_s or 0.0))
        ended = "word" if stop else "eos" if generation.reasons[sample] == "stop" else "limit"
        found: dict[str, Any] = {
            "index": sample,
            "content": "" if stream else text,
            "tokens": [] if stream or not self.body.return_tokens else self.ids(sample),
            "stop": True,
            "model": self.service.name,
            "tokens_predicted": written,
            "tokens_evaluated": job.prompt_tokens,
            "generation_settings": llama_settings(generation.params.model_copy(update={"seed": job.seed})),
            "prompt": self.tokenizer.decode(job.ids),
            "truncated": job.truncated,
            "stop_type": ended,
            "stopping_word": stop,
            "timings": {
                "prompt_n": job.prompt_tokens,
                "prompt_ms": round((generation.first_s or 0.0) * 1000, 3),
                "predicted_n": written,
                "predicted_ms": round(seconds * 1000, 3),
                "predicted_per_second": round(written / seconds, 3),
            },
        }
        if job.logprobs is not None and not stream:
            entries = token_entries(self.tokenizer, generation.records[sample], text)
            found["completion_probabilities"] = [self.entry(entry) for entry in entries]
        return found

    def entry(self, entry: dict[str, Any]) -> dict[str, Any]:
        """With `post_sampling_probs`, probabilities in place of their logarithms."""
        if not self.generation.job.post_sampling:
            return entry

        def plain(one: dict[str, Any]) -> dict[str, Any]:
            kept = {name: one[name] for name in ("id", "token", "bytes")}
            return {**kept, "prob": math.exp(one["logprob"])}

        return {**plain(entry), "top_probs": [plain(one) for one in entry["top_logprobs"]]}

    def ids(self, sample: int) -> list[int]:
        return [event.token_id for event in self.generation.records[sample] if event.token_id is not None]

    def events(self) -> AsyncGenerator[bytes]:
        """The answer as server-sent events, the last of each sample with `stop`; one that fails midway ends with an error."""
        return event_frames(self.generation, self._frames, lambda error: sse(error.body()))

    def _frames(self, event: Event) -> Iterator[bytes]:
        if event.kind == "token" or event.text or event.logprob is not None:
            part: dict[str, Any] = {
                "index": event.index,
                "content": event.text,
                "tokens": [] if event.token_id is None else [event.token_id],
                "stop": False,
                "tokens_predicted": self.generation.counts[event.index],
                "tokens_evaluated": self.generation.job.prompt_tokens,
            }
            if event.logprob is not None:
                part["completion_probabilities"] = [self.entry(token_entry(self.tokenizer, event, event.text))]
            yield sse(part)
        if event.kind == "done":
            yield sse(self.final(event.index, stream=True))
