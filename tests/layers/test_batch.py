"""row_bucket: few capacities, each near what it is for."""

from specrt.layers.batch import row_bucket


def test_buckets_hold_their_rows_and_are_few():
    buckets = [row_bucket(rows, 4096) for rows in range(1, 4097)]
    assert all(rows <= bucket <= max(2 * rows - 1, 1) for rows, bucket in enumerate(buckets, 1))
    assert buckets == sorted(buckets) and len(set(buckets)) == 18  # powers of two, and 160, 320, .. 2560
    assert all(row_bucket(bucket, 4096) == bucket for bucket in set(buckets))
    assert row_bucket(160, 4096) == 160 and row_bucket(161, 4096) == 256 and row_bucket(90, 96) == 96
