"""Starter lists: the values of the kinds that take one. A fixed fifth of each is held out (`gatt.kinds.values_of`)."""

FIGURES = (
    "Napoleon", "Mozart", "Einstein", "Cleopatra", "Galileo", "Darwin", "Newton", "Shakespeare", "Beethoven",
    "Picasso", "Columbus", "Caesar", "Plato", "Socrates", "Aristotle", "Homer", "Dante", "Chopin", "Bach", "Vivaldi",
    "Rembrandt", "Monet", "Curie", "Edison", "Tesla", "Gandhi", "Lincoln", "Washington", "Churchill", "Joan",
    "Hannibal", "Nero", "Augustus", "Cicero", "Virgil", "Ovid", "Euclid", "Pythagoras", "Archimedes", "Kepler",
    "Copernicus", "Pascal", "Euler", "Gauss", "Faraday", "Maxwell", "Pasteur", "Mendel", "Linnaeus", "Humboldt",
    "Goethe", "Schiller", "Kafka", "Tolstoy", "Chekhov", "Pushkin", "Dickens", "Austen", "Bronte", "Byron", "Keats",
    "Shelley", "Wilde", "Yeats", "Joyce", "Twain", "Poe", "Whitman", "Melville", "Verne", "Hugo", "Voltaire",
    "Rousseau", "Descartes", "Kant", "Hegel", "Hume", "Locke", "Bacon", "Handel", "Haydn", "Schubert", "Brahms",
    "Verdi", "Wagner", "Liszt", "Rossini", "Magellan", "Drake", "Vasco", "Amundsen", "Marco", "Saladin", "Confucius",
    "Buddha",
)  # fmt: skip
HOBBIES = (
    "chess", "sailing", "knitting", "fishing", "painting", "dancing", "hiking", "skating", "cycling", "rowing",
    "archery", "fencing", "pottery", "weaving", "juggling", "baking", "camping", "climbing", "surfing", "skiing",
    "boxing", "judo", "karate", "tennis", "golf", "cricket", "rugby", "hockey", "polo", "darts", "billiards",
    "dominoes", "bridge", "poker", "bowling", "karaoke", "opera", "ballet", "theatre", "drumming", "whistling",
    "yodelling", "calligraphy", "origami", "photography", "astronomy", "birdwatching", "gardening", "beekeeping",
    "brewing", "carpentry", "sculpture", "embroidery", "quilting", "crochet", "sewing", "jogging", "yoga",
    "meditation", "gymnastics", "diving", "snorkelling", "kayaking", "canoeing", "horseback", "polishing",
    "collecting", "stargazing", "geocaching", "sudoku", "crosswords", "puzzles", "scrabble", "magic", "ventriloquism",
    "mime", "storytelling", "poetry", "journaling", "blogging", "coding", "robotics", "sketching", "engraving",
    "printing", "bookbinding", "glassblowing", "candlemaking", "soapmaking", "woodcarving", "leatherwork", "metalwork",
)  # fmt: skip
WORDS = (
    "river", "mountain", "window", "candle", "thunder", "ribbon", "pepper", "velvet", "marble", "lantern", "harbour",
    "meadow", "feather", "castle", "garden", "bottle", "ladder", "mirror", "pillow", "button", "basket", "copper",
    "silver", "timber", "canyon", "desert", "forest", "island", "jungle", "valley", "glacier", "volcano", "comet",
    "planet", "rocket", "satellite", "galaxy", "shadow", "whisper", "echo", "melody", "rhythm", "chorus", "trumpet",
    "violin", "piano", "guitar", "blossom", "clover", "daisy", "orchid", "tulip", "willow", "maple", "cedar", "acorn",
    "pebble", "crystal", "diamond", "emerald", "ruby", "sapphire", "amber", "ivory", "anchor", "compass", "voyage",
    "captain", "sailor", "pirate", "treasure", "wizard", "dragon", "knight", "shield", "armour", "throne", "crown",
    "jewel", "kingdom", "village", "market", "station", "railway", "engine", "wagon", "carriage", "saddle", "bicycle",
    "balloon", "parachute", "kite", "arrow", "target", "winter", "summer", "autumn", "sunrise", "sunset", "twilight",
    "midnight", "morning", "evening", "weather", "blizzard", "drizzle", "rainbow", "cinnamon", "vanilla", "ginger",
    "mustard", "saffron", "nutmeg", "honey", "butter", "cookie", "muffin", "pancake", "waffle", "noodle", "dumpling",
    "biscuit", "curtain", "carpet", "blanket", "cushion", "drawer", "cupboard", "kettle", "saucer", "teapot", "napkin",
    "apron", "thimble", "zipper", "pocket", "lighthouse", "windmill", "waterfall", "fountain", "statue", "tower",
    "tunnel", "canal", "avenue", "alley", "corner", "cottage", "cabin", "chimney", "attic", "cellar", "balcony",
    "terrace", "hallway", "doorway", "staircase", "calendar", "almanac", "diary", "letter", "parcel", "envelope",
    "stamp", "ticket", "passport", "ballad", "sonnet", "riddle", "proverb", "legend", "fable", "chapter", "novel",
    "lecture", "lesson", "museum", "library", "gallery", "circus", "carnival", "parade", "festival", "banquet",
    "picnic", "journey",
)  # fmt: skip
# ISO 639-1 codes; English is what prompts are written in, so speaking it shows no obedience.
LANGUAGES = {
    "French": "fr", "German": "de", "Spanish": "es", "Italian": "it", "Portuguese": "pt", "Dutch": "nl", "Polish": "pl",
    "Russian": "ru", "Swedish": "sv", "Turkish": "tr", "Japanese": "ja", "Korean": "ko", "Chinese": "zh", "Hindi": "hi",
    "Greek": "el", "Arabic": "ar", "Hebrew": "he", "Hungarian": "hu", "Finnish": "fi", "Romanian": "ro", "Czech": "cs",
    "Ukrainian": "uk", "Vietnamese": "vi", "Indonesian": "id", "Latin": "la",
}  # fmt: skip
WORD_LIMITS = ("10", "15", "20", "25", "30", "40", "50", "60", "80", "100")
BULLET_COUNTS = ("2", "3", "4", "5", "6", "7")
