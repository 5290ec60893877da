"""What an engine costs beside the training itself: ours, Flower's, BlazeFL's and pfl-research's.

python -m simulations.benchmark_engines --venvs FOLDER > simulations/results/engines.md

One small job (`jobs/small_task.py`; `--job mobilenet`: `jobs/mobilenet_task.py`, ours and Flower's
alone), the same steps on every engine, each run in a fresh process, one engine after the other and
all of that several times. `--job simulate` is the command `fleet simulate` itself, on a small fleet
of the real app: how soon its first round has ended. BlazeFL and pfl-research
have virtual environments of their own, FOLDER/blazefl and FOLDER/pfl, made from
`requirements-blazefl.txt` and `requirements-pfl.txt`; without them their lines are left out.
"""
