"""Whether a large simulated fleet keeps to a machine: memory over rounds, time over fleet sizes.

    python -m simulations.benchmark_scale soak --data FOLDER --images 4 --out runs/scale
    python -m simulations.benchmark_scale soak --clients 10 --sampled 2 --rounds 500 --workers 1 \
        --name in-process --out runs/scale
    python -m simulations.benchmark_scale fleets --data FOLDER --images 4 --out runs/scale
    python -m simulations.benchmark_scale methods --out runs/scale

FOLDER holds CIFAR-10 as parquet, or other images enough for the largest fleet. `methods` holds
MobileTL beside full fine-tuning of the same fleet. Every run has a process of its own, which notes
at the end of each round what it and its workers hold; beside it their memory is looked at all the
while. What is noted lies in `--out`, in a folder for each commit: a run that is complete there is
shown and not run again.
`--rounds`, `--clients` and `--fleet` make it shorter.
"""
