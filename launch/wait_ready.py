#!/usr/bin/env python3
"""Wait until a server answers, and end with status 0; with one line and status 1 where it does not in time.

    launch/wait_ready.py http://ril-judge:8000/ready --timeout=3600

Needs nothing but Python, and goes through no proxy.
"""

import argparse
import http.client
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="answers with status 200 when the server is ready")
    parser.add_argument("--timeout", type=float, default=3600, metavar="SECONDS", help="in all (default: 3600)")
    parser.add_argument("--every", type=float, default=5, metavar="SECONDS", help="between two tries (default: 5)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be asked for, and do not wait")
    args = parser.parse_args(argv)
    if not args.url.startswith(("http://", "https://")):
        parser.error(f"{args.url} does not begin with http://")
    if args.dry_run:
        print(f"GET {args.url} every {args.every:g} s for up to {args.timeout:g} s")
        return 0
    end = time.monotonic() + args.timeout
    told = ""
    while (answer := ask(args.url)) != "200":
        if time.monotonic() + args.every > end:
            print(f"error: {args.url} was not ready within {args.timeout:g} s: {answer}", file=sys.stderr)
            return 1
        if answer != told:
            print(f"waiting for {args.url}: {answer}", flush=True)
            told = answer
        time.sleep(args.every)
    print(f"{args.url} is ready", flush=True)
    return 0


def ask(url: str) -> str:
    """The status that the server answers with, or why there is none."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=10) as answer:
            return str(answer.status)
    except urllib.error.HTTPError as error:
        return f"status {error.code}"
    except (OSError, http.client.HTTPException) as error:
        return str(getattr(error, "reason", None) or error or type(error).__name__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
