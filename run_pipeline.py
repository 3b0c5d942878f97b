"""Run the stages of a pipeline that are not done yet: python run_pipeline.py PIPELINE [a.b=c ...]"""

import sys

from pipelines.cli import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "pipeline"))
