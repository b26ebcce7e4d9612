"""Records as real runs would write them: invented numbers of plausible size."""

from __future__ import annotations

from secateur.core.tags import Speedup
from secateur.report.record import (
    BudgetInfo,
    DataInfo,
    Evenness,
    Latency,
    LatencyRow,
    Layer,
    Machine,
    MachineRow,
    Measure,
    MethodInfo,
    ModelInfo,
    Pair,
    Quality,
    Record,
    RecoveryInfo,
    Reproduction,
    Sizes,
    Timing,
)

ZEROS = (
    "The zeros of this model are unstructured: ordinary dense kernels multiply them like any number, so they save "
    "neither time nor memory by themselves."
)
VERSIONS = {"python": "3.11.2", "secateur": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "numpy": "2.3.1"}
PROJECTIONS = (
    ("self_attn.q_proj", 4096),
    ("self_attn.k_proj", 4096),
    ("self_attn.v_proj", 4096),
    ("self_attn.o_proj", 4096),
    ("mlp.gate_proj", 11008),
    ("mlp.up_proj", 11008),
    ("mlp.down_proj", 11008),
)


def layer(site: str, units: int, kept: int, kind: str = "weight", **facts: float) -> Layer:
    return Layer(site=site, kind=kind, units=units, kept=kept, sparsity=1 - kept / units, facts=facts)


def timing(median: float, spread: float, samples: int) -> Timing:
    return Timing(
        median=median, p10=median * (1 - spread), p90=median * (1 + spread), throughput=1000 * samples / median
    )


def case(batch: int, before: float, after: float, unit: str, spread: float = 0.04) -> LatencyRow:
    return LatencyRow(
        label=f"batch {batch}", before=timing(before, spread, batch), after=timing(after, spread, batch), unit=unit
    )


def machine() -> Machine:
    return Machine(
        rows=[
            MachineRow(label="dense float32, linear 4096x1024", batch=1, ms=0.52, speedup=1.0),
            MachineRow(label="90 % sparse, compressed rows", batch=1, ms=0.41, speedup=1.27),
            MachineRow(label="99 % sparse, compressed rows", batch=1, ms=0.14, speedup=3.71),
            MachineRow(label="half of the rows cut out", batch=1, ms=0.26, speedup=2.0),
        ],
        sentences=["On this machine 90 % zeros bring 1.27x in a sparse kernel; cutting half of the rows brings 2.00x."],
    )


def digits_resnet() -> Record:
    names = ["stem", *(f"stage{s}.{b}.conv{c}" for s in (1, 2, 3) for b in (0, 1) for c in (1, 2)), "head"]
    units = [144, 2304, 2304, 2304, 2304, 4608, 9216, 9216, 9216, 18432, 36864, 36864, 36864, 640]
    shares = [0.72, 0.41, 0.38, 0.36, 0.33, 0.25, 0.19, 0.17, 0.16, 0.12, 0.07, 0.05, 0.04, 0.66]
    return Record(
        title="Digits ResNet at 90 % sparsity",
        model=ModelInfo(name="zoo:digits-resnet", fingerprint="9f3c21aa70b4de18"),
        method=MethodInfo(
            name="global_magnitude",
            title="Is Complexity Required for Neural Network Pruning? A Case Study on Global Magnitude Pruning",
            citation="Gupta, Camci, Keneta, Vaidyanathan, Kanodia, Foo, Wu, Lin 2022, arXiv 2209.14624",
            formula="score = |w|, one ranking over all layers",
        ),
        budget=BudgetInfo(asked="sparsity 0.9", sparsity=0.9),
        structure=Speedup.UNSTRUCTURED,
        quality=Quality(
            metric="accuracy",
            unit="%",
            higher_is_better=True,
            data="zoo:digits, evaluation split",
            before=Measure(value=98.89, interval=(97.78, 99.72), samples=360),
            pruned=Measure(value=81.39, interval=(77.22, 85.28), samples=360),
            recovered=Measure(value=98.06, interval=(96.39, 99.17), samples=360),
        ),
        sizes=Sizes(
            parameters=Pair(before=173_706, after=173_706),
            nonzeros=Pair(before=173_706, after=19_551),
            flops=Pair(before=9_216_512, after=9_216_512),
            flops_note="one image of 1x8x8",
            weight_bytes=Pair(before=694_824, after=694_824),
            file_bytes=Pair(before=699_348, after=699_420),
        ),
        layers=[
            layer(name, n, round(n * share), threshold=0.0817)
            for name, n, share in zip(names, units, shares, strict=True)
        ],
        reproduce=Reproduction(
            command="secateur prune zoo:digits-resnet --method global-magnitude --sparsity 0.9 "
            "--recover finetune --out out/resnet --seed 0",
            python='import secateur as sc\n\nmodel = sc.zoo.load("digits-resnet")\n'
            'plan = sc.plan(model, method="global_magnitude", sparsity=0.9)\nsc.apply_(model, plan)\n'
            'sc.save(model, "out/resnet")',
            seed=0,
            settings={"minimum_threshold": 0.0, "per_layer": False},
            versions=VERSIONS,
        ),
        evenness=Evenness(before=0.152, after=0.033),
        latency=Latency(
            rows=[case(1, 0.612, 0.618, "images/s"), case(16, 2.81, 2.79, "images/s")],
            threads=2,
            dtype="float32",
            device="cpu (2 cores)",
            peak_memory=Pair(before=3_211_264, after=3_211_264),
        ),
        machine=machine(),
        recovery=RecoveryInfo(
            name="finetune",
            settings={"epochs": 5, "learning_rate": 0.001, "optimizer": "adam"},
            text="Five epochs on 1,437 training images with the masks held, 11 s.",
        ),
        warnings=[ZEROS],
    )


def llama_wanda(blocks: int = 4) -> Record:
    layers = [
        layer(f"model.layers.{i}.{name}", units, units // 2, mean_score=0.3 + 0.01 * i)
        for i in range(blocks)
        for name, units in PROJECTIONS
    ]
    return Record(
        title="Tiny Llama at 50 % with Wanda",
        model=ModelInfo(name="zoo:pydoc-llama", fingerprint="0b77e2c94f10a6d3"),
        method=MethodInfo(
            name="wanda",
            title="A Simple and Effective Pruning Approach for Large Language Models",
            citation="Sun, Liu, Bair, Kolter, ICLR 2024, arXiv 2306.11695",
            formula="score = |w_ij| * ||x_j||, compared within each row",
        ),
        budget=BudgetInfo(asked="sparsity 0.5", sparsity=0.5),
        structure=Speedup.UNSTRUCTURED,
        quality=Quality(
            metric="perplexity",
            higher_is_better=False,
            data="zoo:pydoc, held-out topics",
            before=Measure(value=9.412, interval=(9.21, 9.63), samples=128),
            pruned=Measure(value=10.87, interval=(10.61, 11.14), samples=128),
        ),
        sizes=Sizes(
            parameters=Pair(before=481_408, after=481_408),
            nonzeros=Pair(before=481_408, after=284_800),
            flops=Pair(before=118_489_088, after=118_489_088),
            flops_note="one window of 128 tokens",
            weight_bytes=Pair(before=1_925_632, after=1_925_632),
            file_bytes=Pair(before=1_931_544, after=1_931_702),
        ),
        layers=layers,
        reproduce=Reproduction(
            command="secateur prune zoo:pydoc-llama --method wanda --sparsity 0.5 --data zoo:pydoc --out out/wanda",
            python="",
            seed=0,
            settings={"rescale": False, "samples": 128},
            versions=VERSIONS,
        ),
        calibration=DataInfo(name="zoo:pydoc", digest="5d1e8830c2ab9f47", samples=128),
        latency=Latency(
            rows=[case(1, 3.42, 3.91, "tokens/s"), case(16, 28.6, 28.9, "tokens/s")],
            threads=2,
            dtype="float32",
            device="cpu (2 cores)",
        ),
        warnings=[ZEROS],
    )


def llama_depth() -> Record:
    return llama_wanda().model_copy(
        update={
            "title": "Tiny Llama without a quarter of its blocks",
            "method": MethodInfo(
                name="shortgpt",
                title="ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
                citation="Men, Xu, Zhang, Wang, Lin, Lu, Han, Chen 2024, arXiv 2403.03853",
            ),
            "budget": BudgetInfo(asked="sparsity 0.25", sparsity=0.25, units="blocks"),
            "structure": Speedup.STRUCTURED,
            "quality": Quality(
                metric="perplexity",
                higher_is_better=False,
                data="zoo:pydoc, held-out topics",
                before=Measure(value=9.412, interval=(9.21, 9.63), samples=128),
                pruned=Measure(value=71.3, interval=(69.8, 72.9), samples=128),
                recovered=Measure(value=11.42, interval=(11.16, 11.69), samples=128),
            ),
            "sizes": Sizes(
                parameters=Pair(before=481_408, after=383_104),
                nonzeros=Pair(before=481_408, after=383_104),
                flops=Pair(before=118_489_088, after=93_323_264),
                flops_note="one window of 128 tokens",
                weight_bytes=Pair(before=1_925_632, after=1_532_416),
                file_bytes=Pair(before=1_931_544, after=1_537_004),
            ),
            "layers": [layer("model.layers", 4, 3, "block")],
            "latency": Latency(
                rows=[case(1, 3.42, 2.68, "tokens/s"), case(16, 28.6, 22.3, "tokens/s")],
                threads=2,
                dtype="float32",
                device="cpu (2 cores)",
                peak_memory=Pair(before=21_430_272, after=19_202_048),
            ),
            "recovery": RecoveryInfo(name="finetune", settings={"steps": 200, "learning_rate": 0.0005}),
            "warnings": [],
        }
    )


def many_layers(count: int = 60) -> Record:
    """A result with uneven sparsity over `count` layers, one of them nearly empty."""
    layers = []
    for i in range(count):
        name, units = PROJECTIONS[i % len(PROJECTIONS)]
        share = 0.008 if i == count // 2 else 0.35 + 0.5 * ((i * 37) % 29) / 29 * (1 - i / (2 * count))
        layers.append(layer(f"model.layers.{i // len(PROJECTIONS)}.{name}", units, round(units * share)))
    return llama_wanda().model_copy(update={"title": f"A model of {count} layers", "layers": layers})
