"""What the stages import: command line, processes, backbones, files of a run, features."""
