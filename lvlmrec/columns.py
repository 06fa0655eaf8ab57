"""Column names of files and tables that several packages share."""

USER_ID = "user_id"
ITEM_ID = "item_id"
TIMESTAMP = "timestamp"

# item manifest
URI = "uri"
TITLE = "title"
COVER_URI = "cover_uri"
TEXT = "text"

# feature set
PART = "part"
ROW = "row"
GENERATION = "generation"
MADE_WITH = "made_with"
SOURCE = "source"
MADE_WITH = "made_with"
NUM_DISTINCT_FRAMES = "num_distinct_frames"
STAGE = "stage"
ERROR = "error"
MESSAGE = "message"

# ranks
ITEM_RANK = "item_rank"
COLD = "cold"
