"""Whole runs: started, read back, compared, reported. Nothing here imports verl, Ray or vLLM; a run is a subprocess.

launch.launch(preset, to, overrides, limit_s) -> Run       one training run, its processes watched and cleaned up
runs.load_run(folder) -> Run                                curves and validation counts of a finished run
statistics.Rate, statistics.disjoint                        rates with Wilson intervals
report.write_report(runs, to)                               the page, its tables and figures
execute.run_grid(GRID.yaml, to)                             every cell of a grid, resumable; `vgr compare`
results.load_results(folder)                                what a comparison is: one JSON a cell
paired.difference(arm, baseline)                            statistics over paired seeds
demo.run_demo(to)                                           the two-armed comparison of `make demo`
"""
