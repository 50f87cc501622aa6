"""Changes of the UTC offset in the given zones, from Python's zoneinfo with the package tzdata.

    python zones.py FROM_YEAR TO_YEAR ZONE [...]

A line each: ZONE, then OFFSET at the start, then AT=OFFSET for each change: seconds since 1970, seconds ahead of UTC.
"""

import sys
import zoneinfo
from datetime import datetime, timedelta, timezone

# Use the package's data instead of the system's.
zoneinfo.reset_tzpath(to=())

# No zone changes twice within this step.
STEP = 6 * 3600


def main():
    first, last = (int(datetime(int(year), 1, 1, tzinfo=timezone.utc).timestamp()) for year in sys.argv[1:3])
    for name in sys.argv[3:]:
        zone = zoneinfo.ZoneInfo(name)

        def offset(at):
            return int(datetime.fromtimestamp(at, zone).utcoffset() / timedelta(seconds=1))

        words, before = [name, str(offset(first))], first
        for at in range(first + STEP, last, STEP):
            if offset(at) != offset(before):
                low, high = before, at
                while high - low > 1:
                    middle = (low + high) // 2
                    low, high = (middle, high) if offset(middle) == offset(low) else (low, middle)
                words.append(f"{high}={offset(high)}")
            before = at
        print(" ".join(words))


if __name__ == "__main__":
    main()
