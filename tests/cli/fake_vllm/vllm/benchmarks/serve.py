"""What `lmcache.cli.commands.bench.serve` relies on in vLLM's module of this name, and no network.

The words of a prompt say what becomes of its request: `fail` fails, `short` ends after one token, `broken` without
its usage. SENT keeps all that was sent.
"""

import asyncio
import json
from dataclasses import dataclass, field

SENT = []


@dataclass
class SampleRequest:
    prompt: str
    prompt_len: int
    expected_output_len: int = 0
    multi_modal_data: dict | None = None
    request_id: str | None = None
    request_overrides: dict | None = None


@dataclass
class Input:
    prompt: str
    output_len: int
    ignore_eos: bool
    extra_body: dict | None = None
    model: str = "base"
    request_id: str | None = None


@dataclass
class Output:
    success: bool = True
    ttft: float = 0.01
    output_tokens: int = 0
    error: str = ""
    itl: list = field(default_factory=list)


async def send(request_func_input, session, pbar=None):
    SENT.append(request_func_input)
    if "fail" in request_func_input.prompt:
        return Output(success=False, ttft=0.0, error="Traceback\n  at line 1\nServerDown: gone\n")
    if "broken" in request_func_input.prompt:
        return Output()
    return Output(output_tokens=1 if "short" in request_func_input.prompt else request_func_input.output_len)


ASYNC_REQUEST_FUNCS = {"openai": send, "other": send}


def add_cli_args(parser):
    parser.add_argument("--backend", default="openai", choices=list(ASYNC_REQUEST_FUNCS))
    parser.add_argument("--base-url")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--dataset-name", default="random", choices=["random", "custom"])
    parser.add_argument("--random-prefix-len", type=int, default=0)
    parser.add_argument("--num-prompts", type=int, default=2)
    parser.add_argument("--num-warmups", type=int, default=0)
    parser.add_argument("--custom-output-len", type=int, default=4)
    parser.add_argument("--request-id-prefix", default="bench-")
    parser.add_argument("--ready-check-timeout-sec", type=int, default=0)
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--disable-tqdm", action="store_true")
    parser.add_argument("--request-rate", type=float, default=float("inf"))
    parser.add_argument("--header", nargs="*")
    parser.add_argument("--extra-body", type=json.loads)
    parser.add_argument("--insecure", action="store_true")
    parser.add_argument("--model")
    parser.add_argument("--probe-request-rate", type=float, default=0.0)
    parser.add_argument("--lora-modules", nargs="+")


def get_samples(args, tokenizer, **_):
    return [
        SampleRequest(f"random {index}", 2, 4, request_id=f"{args.request_id_prefix}{index}")
        for index in range(args.num_prompts)
    ]


async def benchmark(
    endpoint_type,
    input_requests,
    num_warmups,
    ignore_eos,
    extra_body=None,
    lora_modules=None,
    lora_assignment="random",
    probe_request_rate=0.0,
):
    function = ASYNC_REQUEST_FUNCS[endpoint_type]

    def adapter(index):
        """Chance goes on from call to call; in turn starts anew."""
        turn = index if lora_assignment == "round-robin" else len(SENT)
        return lora_modules[turn % len(lora_modules)] if lora_modules else "base"

    async def ask(request, model="base"):
        body = {**(extra_body or {}), **(request.request_overrides or {})}
        given = Input(request.prompt, request.expected_output_len, ignore_eos, body, model, request.request_id)
        return await function(request_func_input=given, session=None)

    print("Starting initial single prompt test run...")
    for _ in range(num_warmups):
        await ask(input_requests[0])
    print("Starting main benchmark run...")
    outputs = [await ask(request, adapter(index)) for index, request in enumerate(input_requests)]
    if probe_request_rate:
        await function(request_func_input=Input("Hi", 1, ignore_eos), session=None)
    completed = sum(output.success for output in outputs)
    print("{s:{c}^{n}}".format(s=" Serving Benchmark Result ", n=50, c="="))
    print("{:<40} {:<10}".format("Successful requests:", completed))
    print("=" * 50)
    print("Stopping profiler...")
    return {
        "duration": 2.0,
        "completed": completed,
        "failed": len(outputs) - completed,
        "rtfx": float("nan"),
        "ttfts": [output.ttft for output in outputs],
        "input_lens": [request.prompt_len for request in input_requests],
        "errors": [output.error for output in outputs],
        "generated_texts": ["text"] * len(outputs),
    }


def main(args):
    print(args)
    if args.model == "unknown":
        raise ValueError("no tokenizer for unknown\nat all")
    requests = get_samples(args, None)
    result = asyncio.run(
        benchmark(
            endpoint_type=args.backend,
            input_requests=requests,
            num_warmups=args.num_warmups,
            ignore_eos=args.ignore_eos,
            lora_modules=args.lora_modules,
            lora_assignment="random",
            probe_request_rate=args.probe_request_rate,
        )
    )
    return {"backend": args.backend, **result}
