import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.SQLException;
import java.util.UUID;

/**
 * Publishing through the outbox with plain JDBC: one insert in the transaction that is there anyway.
 *
 * <pre>
 * connection.setAutoCommit(false);
 * statement.executeUpdate("update stock set quantity = quantity - 1 where product = 'tea'");
 * Outbox.publish(connection, "orders.created", "tea", "{\"order\": 1}", null);
 * connection.commit();
 * </pre>
 */
public final class Outbox {
    private static final String INSERT =
        "insert into postroad.outbox (id, topic, key, payload, content_type, headers)"
            + " values (?, ?, ?, ?, 'application/json', cast(? as jsonb))";

    private Outbox() {}

    /**
     * Update the row that the key stands for first: that keeps its messages in order. {@code key} and {@code headersJson} may be
     * null. Returns the message's id.
     */
    public static String publish(Connection connection, String topic, String key, String payloadJson, String headersJson)
            throws SQLException {
        String id = UUID.randomUUID().toString();
        try (PreparedStatement insert = connection.prepareStatement(INSERT)) {
            insert.setString(1, id);
            insert.setString(2, topic);
            insert.setString(3, key);
            insert.setString(4, payloadJson);
            insert.setString(5, headersJson);
            insert.executeUpdate();
        }
        return id;
    }

    public static void main(String[] arguments) throws SQLException {
        try (Connection connection = DriverManager.getConnection(System.getenv("JDBC_URL"))) {
            connection.setAutoCommit(false);
            System.out.println(publish(connection, "orders.created", "tea", "{\"from\": \"jdbc\"}", "{\"traceparent\": \"00-1\"}"));
            connection.commit();
            publish(connection, "orders.created", null, "{\"from\": \"nowhere\"}", null);
            connection.rollback();
        }
    }
}
