"""What training leaves behind: the folder of a run, the list of runs, plots."""
